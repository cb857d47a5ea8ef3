# SPDX-License-Identifier: Apache-2.0
"""What would make a dump or a restore fail is found before anything starts, and named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab import container
from moving import Outcome, migrate, only_side
from test_runc_contents import Scene, hosts_with_tool  # noqa: F401 - a fixture


@pytest.fixture
def scene(hosts_with_tool: Scene) -> Iterator[Scene]:  # noqa: F811
    yield hosts_with_tool
    hosts_with_tool.remove()


def failed(done: Outcome) -> list[tuple[str, str]]:
    """(check, host) of each check that has failed."""
    return [(e["check"], e["host"]) for e in done.events if e["event"] == "check-failed"]


@pytest.mark.parametrize("options", [["--check-only"], []])
def test_all_checks_that_fail_on_both_hosts_are_listed_and_nothing_starts(
    scene: Scene, options: list[str]
) -> None:
    a, b = scene.lab.a, scene.lab.b
    scene.start()
    (pid,) = scene.processes(a, "tool pause")
    a.run("kill", "-STOP", pid)
    scene.exec("pause")
    config = b.outside(container.PYPLOOP_CONFIG)
    config.write_text(config.read_text().replace('live = ["10.', 'live = ["11.'))
    b.outside("/srv/ct").mkdir(0o700)
    (b.outside("/srv/ct") / "config.json").touch()
    done = migrate(scene.lab, a, *options)
    assert failed(done) == [("stopped", ""), ("processes", ""), ("trust", "b"), ("exists", "b")]
    assert done.code == 8
    lines = done.errors.splitlines()
    assert lines[0].startswith("Check stopped failed: ") and f"run kill -CONT {pid}" in lines[0]
    assert lines[1].startswith("Check processes failed: ")
    assert lines[2].startswith("Check trust failed on b: this host does not restore memory")
    assert lines[3].startswith("Check exists failed on b: /srv/ct has a config.json already")
    assert lines[4].startswith("4 checks failed: stopped, processes, trust, exists; the migration")
    assert only_side(scene.lab) is a
