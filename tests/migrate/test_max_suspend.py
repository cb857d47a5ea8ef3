# SPDX-License-Identifier: Apache-2.0
"""`--max-suspend`: a container whose suspended time would be longer goes on at the source, and
the forecast is shown, kept, and compared with what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from anypair import Pair
from lab import container, verify
from lab.hosts import Lab
from moving import files, judge, migrate
from schema_check import check_lines
from test_command import pair  # noqa: F401 - a fixture

from pyploop.migration.source import host_rates


def events_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    check_lines(text)
    return [json.loads(line) for line in text.splitlines()]


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == name]


def test_a_container_that_cannot_be_quick_enough_goes_on_here(
    pair: Pair,  # noqa: F811
    tmp_path: Path,
) -> None:
    log = tmp_path / "events"
    words = ("--live", "--max-suspend", "1ms", "--json", str(log))
    done = pair.migrate(pair.a, *words)
    assert done.returncode == 6, done.stderr
    assert "would not be within --max-suspend" in done.stderr
    assert "1 ms allowed" in done.stderr
    assert "the container is on this host as before" in done.stderr
    assert "--on-deadline freeze" in done.stderr
    events = events_of(log)
    assert [e["moment"] for e in named(events, "forecast")] == ["check", "suspend"]
    assert not named(events, "moved")
    pair.runs_only_on(pair.a)


def test_it_moves_in_any_case_with_on_deadline_freeze(
    pair: Pair,  # noqa: F811
    tmp_path: Path,
) -> None:
    log = tmp_path / "events"
    words = ("--live", "--max-suspend", "1ms", "--on-deadline", "freeze", "--json", str(log))
    done = pair.migrate(pair.a, *words)
    assert done.returncode == 0, done.stderr
    assert "although --max-suspend is not kept" in done.stdout
    events = events_of(log)
    (suspended,) = named(events, "suspended")
    (moved,) = named(events, "moved")
    (_, last) = named(events, "forecast")
    assert suspended["forecast"] == last["total"]
    assert suspended["actual"] == pytest.approx(moved["steps"]["total"])
    assert suspended["ratio"] == pytest.approx(suspended["actual"] / suspended["forecast"])
    pair.runs_only_on(pair.b)
    # The next one there has that measurement.
    kept = host_rates.read(str(pair.a / "state"), "command", "other")
    assert set(kept) == {"suspend", "dump", "transfer", "restore"}


def test_what_fits_moves_and_the_next_forecast_is_by_its_measurement(
    pair: Pair,  # noqa: F811
    tmp_path: Path,
) -> None:
    log = tmp_path / "events"
    for source, other in ((pair.a, pair.b), (pair.b, pair.a)):
        done = pair.migrate(source, "--live", "--max-suspend", "50", "--json", str(log))
        assert done.returncode == 0, done.stderr
        assert {e["learned"]["dump"] for e in named(events_of(log), "forecast")} == {0}
        pair.runs_only_on(other)
    done = pair.migrate(pair.a, "--live", "--check-only", "--json", str(log))
    assert done.returncode == 0, done.stderr
    (f,) = named(events_of(log), "forecast")
    assert f["moment"] == "check"
    assert f["learned"] == {"suspend": 1, "dump": 1, "transfer": 1, "restore": 1}
    assert "Forecast of the suspended time: " in done.stdout
    assert "by 1 earlier migrations" in done.stdout


def test_check_only_says_what_would_be_refused(pair: Pair) -> None:  # noqa: F811
    done = pair.migrate(pair.a, "--live", "--check-only", "--max-suspend", "1ms")
    assert done.returncode == 6
    assert "Forecast of the suspended time: " in done.stdout
    assert "the migration has changed nothing on either host" in done.stderr
    assert "(check forecast)" in done.stderr
    words = ("--live", "--check-only", "--max-suspend", "1ms", "--on-deadline", "freeze")
    assert pair.migrate(pair.a, *words).returncode == 0
    pair.runs_only_on(pair.a)


def test_it_needs_live(pair: Pair) -> None:  # noqa: F811
    done = pair.migrate(pair.a, "--max-suspend", "1")
    assert done.returncode == 1
    assert "--max-suspend needs --live" in done.stderr


def test_a_runc_container_that_cannot_be_quick_enough_goes_on_here(two_hosts: Lab) -> None:
    before = files(two_hosts.b)
    with container.container(two_hosts), verify.client(two_hosts) as client:
        client.mark()
        refused = migrate(two_hosts, two_hosts.a, "--max-suspend", "1ms")
        assert refused.code == 6, refused.errors
        (check, last) = named(refused.events, "forecast")
        assert last["memory"] > 1 << 16
        assert check["wire_from"] == "probe"
        assert check["wire"] > 0
        assert judge(two_hosts, client, before) is two_hosts.a
        moved = migrate(two_hosts, two_hosts.a, "--max-suspend", "60")
        assert moved.code == 0, moved.errors
        (suspended,) = named(moved.events, "suspended")
        assert set(suspended["actual_steps"]) == set(suspended["forecast_steps"])
        assert judge(two_hosts, client, before) is two_hosts.b
        container.remove(two_hosts.b)
