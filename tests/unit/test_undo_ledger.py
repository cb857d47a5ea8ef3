# SPDX-License-Identifier: Apache-2.0
"""Undo steps are undone when a process or its watchdog dies or hangs; no root needed."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import pyploop_cmd, pyploop_env, tmpfs, wait_until

from pyploop.errors import CommandError, DeviceControlError, LoopError
from pyploop.report.events import Reporter, TextRenderer
from pyploop.undo import journal, watchdog
from pyploop.undo.ledger import UndoLedger

OWNER = """
import sys, time
from pathlib import Path
from pyploop.report.events import Reporter
from pyploop.undo.ledger import UndoLedger
ledger = UndoLedger("a test", Reporter())
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
time.sleep(60)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a journal folder of its own."""
    monkeypatch.setenv(journal.ENVIRONMENT, str(tmp_path / "run"))
    return tmp_path


class Owner:
    """Another process with a ledger."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=pyploop_env(),
            start_new_session=True,
        )

    def do(self, line: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def two_steps(self, place: Path, name: str) -> Path:
        """Two steps; when each is undone, it adds its number to the file."""
        log = place / name
        self.do(f"ledger.add(dict(kind='run', argv=['sh', '-c', 'echo 1 >>{log}'], timeout=9))")
        self.do(f"ledger.add(dict(kind='run', argv=['sh', '-c', 'echo 2 >>{log}'], timeout=9))")
        return log

    def watchdogs(self) -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                words = stat.read_text().rpartition(")")[2].split()
                line = stat.with_name("cmdline").read_bytes()
            except OSError:
                continue
            if int(words[1]) == self.process.pid and b"watchdog.py" in line:
                found.append(int(stat.parts[2]))
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def owner(place: Path) -> Iterator[Owner]:
    made = Owner()
    try:
        yield made
    finally:
        made.close()


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def setting(place: Path, value: str = "old") -> Path:
    """A file like the kernel's: a value and nothing else."""
    path = place / "setting"
    path.write_text(value)
    return path


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.invariant(number=3)
def test_the_steps_of_a_killed_process_are_undone_in_reverse(
    place: Path, owner: Owner, group: bool
) -> None:
    log = owner.two_steps(place, "log")
    if group:
        os.killpg(owner.process.pid, signal.SIGKILL)
    else:
        owner.process.kill()
    wait_until(lambda: text(log) == "2\n1\n", "everything is undone")
    wait_until(lambda: not journal.records(), "the journal has gone")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_watchdog_takes_no_signal_that_ends_others(
    place: Path, owner: Owner, signum: signal.Signals
) -> None:
    log = owner.two_steps(place, "log")
    (pid,) = owner.watchdogs()
    os.kill(pid, signum)
    owner.process.kill()
    wait_until(lambda: text(log) == "2\n1\n", "everything is undone")


@pytest.mark.invariant(number=3)
def test_a_process_that_hangs_past_the_limit_is_undone_and_notices_it(
    place: Path, owner: Owner
) -> None:
    log = owner.two_steps(place, "log")
    owner.do("ledger.limit(0.3)")
    owner.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: text(log) == "2\n1\n", "everything is undone")
    wait_until(lambda: not journal.records(), "the journal has gone")
    late = place / "late"
    owner.process.send_signal(signal.SIGCONT)
    code = "\\n".join(
        [
            "from pyploop.errors import LoopError",
            "try: ledger.renew(9)",
            f"except LoopError: Path('{late}').write_text('learnt')",
        ]
    )
    owner.do(f"exec('''{code}''')")
    assert text(late) == "learnt"
    owner.do("ledger.close()")
    assert text(log) == "2\n1\n", "not undone a second time"


def test_what_is_added_after_the_limit_does_not_stay(place: Path) -> None:
    path, ledger = setting(place), UndoLedger("a test", Reporter())
    try:
        ledger.add({"kind": "write", "path": str(place / "gone"), "value": "x"})
        ledger.limit(0)
        assert ledger._line is not None
        wait_until(lambda: not journal.records(), "the limit has passed")
        # As one who was asleep between looking and acting.
        ledger._send(op="add", id=9, entry={"kind": "write", "path": str(path), "value": "new"})
        wait_until(lambda: path.read_text() == "new", "undone")
        with pytest.raises(LoopError, match="the watchdog thawed it"):
            ledger.watch()
    finally:
        ledger.close()


def test_a_yes_to_renew_moves_the_limit(place: Path) -> None:
    path, ledger = setting(place), UndoLedger("a test", Reporter())
    try:
        held = ledger.set_file(str(path), "new", "put it back")
        assert held is not None
        ledger.limit(0.2)
        ledger.renew(60)
        start = time.monotonic()
        while time.monotonic() < start + 0.4:
            ledger.watch()
        assert path.read_text() == "new"
        ledger.undo(held)
        assert path.read_text() == "old"
    finally:
        ledger.close()
    assert journal.records() == []


def test_a_dead_watchdog_is_noticed_and_its_steps_are_undone_here(place: Path) -> None:
    path, ledger = setting(place), UndoLedger("a test", Reporter())
    try:
        ledger.set_file(str(path), "new", "put it back")
        assert ledger._process is not None
        ledger._process.kill()
        ledger._process.wait()
        with pytest.raises(DeviceControlError, match="has died"):
            ledger.renew(60)
        with pytest.raises(DeviceControlError, match="has died"):
            ledger.add({"kind": "write", "path": "/x", "value": ""})
    finally:
        ledger.close()
    assert (path.read_text(), journal.records()) == ("old", [])


def test_a_watchdog_that_died_before_the_freeze_is_replaced_by_one_that_knows_all(
    place: Path, owner: Owner
) -> None:
    log = owner.two_steps(place, "log")
    (first,) = owner.watchdogs()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: first not in owner.watchdogs() or zombie(first), "it is dead")
    owner.do("ledger.start()")
    assert [p for p in owner.watchdogs() if p != first]
    owner.process.kill()
    wait_until(lambda: text(log) == "2\n1\n", "everything is undone")


def test_what_the_watchdog_has_undone_is_never_forgotten_by_a_new_one(place: Path) -> None:
    path, ledger = setting(place), UndoLedger("a test", Reporter())
    try:
        ledger.set_file(str(path), "new", "put it back")
        ledger.limit(0)
        wait_until(lambda: path.read_text() == "old", "the limit has passed")
        with pytest.raises(LoopError, match="the watchdog thawed it"):
            ledger.renew(60)
        for _ in range(2):
            with pytest.raises(LoopError, match="the watchdog thawed it"):
                ledger.start()
        with pytest.raises(LoopError, match="the watchdog thawed it"):
            ledger.add({"kind": "write", "path": str(path), "value": "old"})
        ledger.unlimit()
        with pytest.raises(LoopError, match="the watchdog thawed it"):
            ledger.in_time()
    finally:
        ledger.close()
    assert (path.read_text(), journal.records()) == ("old", [])


@pytest.mark.parametrize("seconds", [60.0, None])
def test_a_watchdog_that_dies_in_the_freeze_is_not_replaced(
    place: Path, seconds: float | None
) -> None:
    """It may have undone something just before: nobody can tell."""
    path, ledger = setting(place), UndoLedger("a test", Reporter())
    try:
        ledger.set_file(str(path), "new", "put it back")
        ledger.limit(seconds)
        kill_watchdog(ledger)
        with pytest.raises(DeviceControlError, match="has died"):
            ledger.start()
        assert path.read_text() == "new"
    finally:
        ledger.close()
    assert path.read_text() == "old"


def test_a_watchdog_that_is_dead_when_the_limit_has_passed_may_have_undone(place: Path) -> None:
    path, ledger = setting(place), UndoLedger("a test", Reporter())
    try:
        ledger.set_file(str(path), "new", "put it back")
        ledger.limit(0.3)
        kill_watchdog(ledger)
        until = time.monotonic() + 0.3
        wait_until(lambda: time.monotonic() > until, "the limit passes")
        ledger.take_over()
        with pytest.raises(LoopError, match="may have thawed the source"):
            ledger.watch()
        assert path.read_text() == "new"
    finally:
        ledger.close()
    assert path.read_text() == "old", "undone here"


def test_a_limit_that_has_passed_is_known_without_an_answer(place: Path) -> None:
    """The watchdog is still busy: it undoes before it says so."""
    ledger = UndoLedger("a test", Reporter())
    try:
        ledger.add({"kind": "run", "argv": ["sleep", "1"], "timeout": 9})
        ledger.limit(0.1)
        ledger.in_time()
        until = time.monotonic() + 0.1
        wait_until(lambda: time.monotonic() > until, "the limit passes")
        with pytest.raises(LoopError, match="frozen for more than"):
            ledger.in_time()
    finally:
        ledger.close()


def test_a_watchdog_that_starts_after_the_limit_was_set_knows_it(place: Path) -> None:
    path, ledger = setting(place), UndoLedger("a test", Reporter())
    try:
        ledger.limit(0.5)
        ledger.set_file(str(path), "new", "put it back")
        assert path.read_text() == "new"
        wait_until(lambda: path.read_text() == "old", "undone at the limit")
    finally:
        ledger.close()


def test_after_a_freeze_that_was_undone_here_another_may_begin(place: Path) -> None:
    path, ledger = setting(place), UndoLedger("a test", Reporter())
    try:
        for _ in range(2):
            held = ledger.set_file(str(path), "new", "put it back")
            assert held is not None
            ledger.limit(60)
            ledger.renew(60)
            assert ledger.undo(held)
            ledger.unlimit()
        kill_watchdog(ledger)
        ledger.start()  # between two freezes it is replaced
        ledger.watch()
    finally:
        ledger.close()


def kill_watchdog(ledger: UndoLedger) -> None:
    assert ledger._process is not None
    ledger._process.kill()
    ledger._process.wait()


def zombie(pid: int) -> bool:
    return journal.start_time(pid) is None


@pytest.mark.invariant(number=3)
def test_when_both_are_killed_pyploop_thaw_undoes(place: Path, owner: Owner) -> None:
    log = owner.two_steps(place, "log")
    assert thaw("--all") == (0, "")
    assert text(log) == "", "a living one is not touched"
    code, out = thaw(str(owner.process.pid))
    assert (code, "belongs to process" in out) == (17, True)
    for pid in owner.watchdogs():
        os.kill(pid, signal.SIGSTOP)  # so that it cannot be quicker
    watchdogs = owner.watchdogs()
    owner.process.kill()
    for pid in watchdogs:
        os.kill(pid, signal.SIGKILL)
    owner.process.wait()
    wait_until(lambda: all(zombie(p) for p in watchdogs), "both are dead")
    code, out = thaw()
    assert (code, "left behind" in out, out.count("run")) == (0, True, 2)
    assert thaw(str(owner.process.pid))[0] == 0
    assert text(log) == "2\n1\n"
    assert thaw("--list") == (0, "")


def test_what_the_watchdog_could_not_undo_is_listed_with_its_reason(
    place: Path, owner: Owner
) -> None:
    owner.do("ledger.add(dict(kind='run', argv=['false'], timeout=9, what='resume it'))")
    owner.do("ledger.add(dict(kind='run', argv=['sleep', '60'], timeout=0.1, what='hangs'))")
    log = owner.two_steps(place, "log")
    owner.process.kill()
    wait_until(lambda: text(log) == "2\n1\n", "the rest is undone")
    wait_until(lambda: "failed" in thaw("--list")[1], "it is told")
    out = thaw("--list")[1].splitlines()
    assert out[1:] == [
        "    resume it (failed: exit code 1)",
        "    hangs (failed: Connection timed out)",
    ]
    code, out = thaw("--all")  # type: ignore[assignment]
    assert (code, "resume it: exit code 1" in out) == (3, True)


def test_what_can_never_be_undone_is_forgotten_by_name(place: Path, owner: Owner) -> None:
    name = str(owner.process.pid)
    owner.do("ledger.add(dict(kind='run', argv=['false'], timeout=9, what='resume it'))")
    assert thaw("--forget", name) == (
        17,
        f"pyploop thaw: journal {name} belongs to process {name}, which is running and undoes it "
        "itself\n",
    )
    owner.process.kill()
    wait_until(lambda: "failed" in thaw("--list")[1], "it is told")
    code, out = thaw("--all")
    assert (code, out.splitlines()[0]) == (3, "pyploop thaw: resume it: exit code 1")
    assert f"pyploop thaw --forget {name}" in out
    assert thaw("--forget", name) == (0, f"{name}  removed, and not undone: resume it\n")
    assert (journal.records(), thaw("--all")) == ([], (0, ""))


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["nobody"], 4),
        (["--forget"], 38),
        (["--forget", "--all"], 38),
        (["--all", "1"], 38),
        (["--what"], 38),
        ([], 0),
    ],
)
def test_thaw_has_an_exit_code_for_each_end(place: Path, args: list[str], code: int) -> None:
    assert thaw(*args)[0] == code


def thaw(*args: str) -> tuple[int, str]:
    done = subprocess.run(
        [*pyploop_cmd(), "thaw", *args],
        env=pyploop_env(),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_process_killed_while_its_watchdog_starts_leaves_no_journal(
    place: Path, owner: Owner
) -> None:
    owner.do("ledger.launch()")
    assert len(journal.records()) == 1
    owner.process.kill()
    wait_until(lambda: not journal.records(), "the journal has gone")


def test_what_was_prepared_and_never_begun_leaves_no_journal(place: Path, owner: Owner) -> None:
    log = place / "log"
    foreseen = f"dict(kind='run', argv=['sh', '-c', 'echo 1 >>{log}'], timeout=9)"
    owner.do("ledger.start()")
    owner.do(f"ledger.prepare({foreseen})")
    assert [len(r.entries) for r in journal.records()] == [1]
    owner.process.kill()
    wait_until(lambda: not journal.records(), "the journal has gone")
    ledger = UndoLedger("a test", Reporter())
    ledger.start()
    ledger.prepare({"kind": "run", "argv": ["touch", str(log)], "timeout": 9})
    ledger.close()
    assert (journal.records(), log.exists()) == ([], False)


# ---- entries


@pytest.mark.parametrize(
    ("more", "after"),
    [
        ({}, "back"),
        ({"only_if": "now"}, "back"),
        ({"only_if": "else"}, "now"),
        ({"inode": 1}, "now"),
    ],
)
def test_a_value_is_put_back_unless_it_is_another_now(
    place: Path, more: dict[str, Any], after: str
) -> None:
    path = setting(place, "now")
    entry = {"kind": "write", "path": str(path), "value": "back", **more}
    watchdog.write_value(entry)
    assert path.read_text()[:4].strip() == after
    path.unlink()
    watchdog.write_value(entry)  # what has gone needs nothing
    assert not path.exists()


def test_a_failed_undo_command_is_an_error_that_shows_how_to_undo_by_hand(place: Path) -> None:
    ledger = UndoLedger("a test", Reporter())
    try:
        held = ledger.add(
            {
                "kind": "run",
                "argv": ["sh", "-c", "exit 3"],
                "timeout": 5,
                "what": "resume it",
                "by_hand": "do it",
            }
        )
        with pytest.raises(CommandError, match="cannot resume it: exit code 3") as e:
            ledger.undo(held)
        assert f"by hand: do it, or pyploop thaw {os.getpid()}" in str(e.value)
        assert not ledger.undo(held), "once"
    finally:
        ledger.close()
    (left,) = journal.records()
    assert [journal.describe(x) for x in left.entries] == ["resume it"]


def test_without_a_journal_the_watchdog_still_undoes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(journal.ENVIRONMENT, "/proc/nowhere")
    path, ledger = setting(place), UndoLedger("a test", Reporter())
    ledger.set_file(str(path), "new", "put it back")
    assert ledger._line is not None
    ledger._line.close()  # as when this process dies
    wait_until(lambda: path.read_text() == "old", "undone")
    ledger.close()


@pytest.mark.root
@pytest.mark.parametrize("full", ["at the start", "later", "at the end"])
def test_a_folder_that_takes_no_more_costs_the_journal_only(place: Path, full: str) -> None:
    said = io.StringIO()
    report = Reporter()
    report.add(TextRenderer(3, said, said))
    log, run = place / "log", place / "run"
    undo = {"kind": "run", "argv": ["sh", "-c", f"echo undone >>{log}"], "timeout": 9}
    with tmpfs(run, 8192):
        run.chmod(0o700)

        def fill(when: str) -> None:
            if when == full:
                (run / "full").write_bytes(b"x" * 4096)
                with contextlib.suppress(OSError):
                    (run / "full.too").write_bytes(b"x" * 4096)

        fill("at the start")
        ledger = UndoLedger("a test", report)
        ledger.start()
        fill("later")
        ledger.add(undo)
        fill("at the end")
        ledger.close()
        assert [p.name for p in run.iterdir() if "json" in p.name] == []
    assert log.read_text() == "undone\n"
    assert said.getvalue().count("after a crash `pyploop thaw` cannot undo this copy") == 1
