# SPDX-License-Identifier: Apache-2.0
"""The checks before a migration: their names, and that all which fail are reported.

After a change of the table:

    python tests/unit/test_checks.py
"""

from __future__ import annotations

import io
import json

import pytest
from support import ROOT

from pyploop.errors import MigrateError, VzExitCode
from pyploop.migration.source.orchestrator import _all_reported
from pyploop.report.events import JsonRenderer, Reporter, TextRenderer
from pyploop.runtimes import checks
from pyploop.runtimes.checks import CHECKS, Checks, ChecksFailedError, Failed
from pyploop.wire import messages

PAGE = ROOT / "docs/reference/checks.md"


def test_the_page_has_the_table_of_the_code() -> None:
    assert PAGE.read_text().endswith(f"\n\n{checks.table()}")


def test_every_name_is_used_and_is_one_that_the_other_host_takes() -> None:
    files = [p for p in (ROOT / "pyploop").rglob("*.py") if p.name != "checks.py"]
    files += (ROOT / "pyploop/migration").rglob("checks.py")
    text = "".join(p.read_text() for p in files)
    assert [name for name in CHECKS if f'"{name}"' not in text] == []
    for name in CHECKS:
        error = {"failed": [{"name": name, "code": 15, "message": "x", "hint": ""}]}
        assert messages.failed_checks(error) == [(name, 15, "x", "")]


P, F, M = (f"migrate/test_{n}.py" for n in ("preflight", "checks_fire", "podman"))
U = "unit/test_preflight_parts.py"
FIRES = {
    **dict.fromkeys(
        [
            "stopped",
            "processes",
            "trust",
            "exists",
            "io-uring",
            "bpf",
            "userfaultfd",
            "anonymous-file",
            "memfd-secret",
            "packet-pipe",
            "posix-queues",
            "outside-file",
            "outside-terminal",
            "deleted-file-linked",
            "deleted-file-size",
            "vsock",
            "socket-family",
            "mptcp",
            "netlink-data",
            "netlink-link-events",
            "outside-socket",
            "nested-pid-namespace",
            "nested-time-namespace",
            "nested-user-namespace",
            "nested-uts-namespace",
            "nested-ipc-namespace",
            "nested-network-namespace",
            "nested-cgroup-namespace",
            "user-namespace-network",
            "submount",
            "runc-options",
            "file-system",
            "immutable-files",
            "cgroups",
            "seccomp",
            "limits",
        ],
        P,
    ),
    **dict.fromkeys(
        [
            "config-json",
            "config-host",
            "network-namespace",
            "mounts",
            "root",
            "images-room",
            "tree",
            "connection",
            "machine",
            "cpu",
            "policy",
            "same-places",
        ],
        F,
    ),
    **dict.fromkeys(
        [
            "podman-pod",
            "podman-dependencies",
            "podman-privileged",
            "podman-users",
            "podman-namespaces",
            "podman-mount",
            "podman-systemd",
            "podman-volume",
            "podman-bind",
            "podman-link",
            "podman-network",
            "podman-secret",
            "podman-port",
        ],
        M,
    ),
    "podman-rm": "migrate/test_podman_options.py",
    "podman-shared": M,
    **dict.fromkeys(
        [
            "podman",
            "podman-rootless",
            "podman-version",
            "podman-storage",
            "podman-cgroups",
            "podman-running",
            "podman-nft",
        ],
        "migrate/test_podman_checks.py",
    ),
    "forecast": "migrate/test_max_suspend.py",
    "external": "migrate/test_runc_contents.py",
    "mounted": "migrate/test_runc_contents.py",
    "private": F,
    "tree-room": F,
    # Stand-ins: this machine cannot be in that state.
    "socket-protocol": U,
    "lsm": U,
    "podman-runtime": "unit/test_podman_parts.py",
    "podman-log": "unit/test_podman_parts.py",
}
"""Check -> the test file that makes it fire, by its name or (`lsm`) by what it says."""
UNNAMED = {
    "other",
    "places",
    "criu",
    "freezer",
    "ext4-mmp",
    "disk",
    "agent-version",
    "lock",
    "busy",
    "disk-room",
    "podman-root",
    "podman-description",
}
"""Those that no test calls by name yet.  A new check must not come here."""


def test_each_check_has_a_test_in_which_it_fires() -> None:
    assert FIRES.keys() | UNNAMED == CHECKS.keys()
    assert not FIRES.keys() & UNNAMED
    texts = {f: (ROOT / "tests" / f).read_text() for f in set(FIRES.values())}
    texts[U] += '"lsm"' if "check_labels" in texts[U] else ""
    assert [n for n, f in FIRES.items() if not _names(texts[f], n)] == []


def _names(text: str, check: str) -> bool:
    said = (f'"{check}"', f"check {check}", f"Check {check} failed")
    return any(words in text for words in said)


def two() -> Checks:
    found = Checks()
    with found.named("trust"):
        raise MigrateError(VzExitCode.BAD_CONFIG, "not trusted", hint="trust it")
    with found.named("cpu"):
        raise MigrateError(VzExitCode.CPU, "another CPU")
    return found


def test_all_that_fail_are_collected_and_the_first_gives_the_exit_code() -> None:
    with pytest.raises(ChecksFailedError) as e:
        two().end()
    assert e.value.exit_code == VzExitCode.BAD_CONFIG
    assert str(e.value) == "2 checks failed: trust, cpu"
    assert [f.message for f in e.value.failed] == ["not trusted", "another CPU"]


def test_a_single_failure_keeps_its_own_words_and_hint() -> None:
    with pytest.raises(ChecksFailedError) as e, checks.naming("lock"):
        raise MigrateError(VzExitCode.LOCKED, "it is locked", path="/x", hint="wait")
    assert (str(e.value), e.value.hint) == ("it is locked (check lock)", "wait")
    assert (e.value.exit_code, e.value.path) == (VzExitCode.LOCKED, "/x")


def test_what_failed_on_both_hosts_is_reported_one_by_one() -> None:
    text, lines, report = io.StringIO(), io.StringIO(), Reporter()
    report.add(TextRenderer(0, text, text))
    report.add(JsonRenderer(lines))
    found = Checks()
    with found.named("stopped"):
        raise MigrateError(VzExitCode.DUMP_FAILED, "7 is stopped")
    theirs = [Failed("trust", 15, "not trusted", "trust it", "b")]
    with pytest.raises(ChecksFailedError) as e, _all_reported(found, report):
        raise ChecksFailedError([*found.failed, *theirs])
    assert e.value.exit_code == VzExitCode.DUMP_FAILED
    assert text.getvalue().splitlines() == [
        "Check stopped failed: 7 is stopped",
        "Check trust failed on b: not trusted. Hint: trust it",
    ]
    events = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [(x["check"], x["code"], x["host"]) for x in events] == [
        ("stopped", 8, ""),
        ("trust", 15, "b"),
    ]


@pytest.mark.parametrize("failed", [None, "x", [1], [{"name": 3}], [{"name": "A b"}], [{}]])
def test_a_list_of_failed_checks_that_is_none_is_not_believed(failed: object) -> None:
    assert messages.failed_checks({"code": 15, "message": "x", "failed": failed}) == []


def test_a_target_with_endless_failures_is_cut_short() -> None:
    one = {"name": "cpu", "code": 99, "message": "x" * 10000, "hint": ["y"] * 10000}
    found = messages.failed_checks({"failed": [one] * 1000})
    assert len(found) == messages.MOST_FAILED
    assert found[0][1] == 1
    assert max(len(found[0][2]), len(found[0][3])) <= messages.LONGEST_TEXT + 1


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition("| check |")[0] + checks.table())
