# SPDX-License-Identifier: Apache-2.0
"""The public names: what they load, what they leave alone, and that threads may use them."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
from support import ROOT, pyploop_env

import pyploop
from pyploop import events

MIB = 1 << 20
MODULES_OF_A_COPY = 91
"""Of pyploop, when `pyploop copy` copies a file.  Each costs up to a millisecond."""
MODULES_OF_PYTHON = 140
"""The same, of all others: 124 with Python 3.11, and other versions differ a little."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(2 * MIB) + bytes(MIB))
    return path


def in_a_process(code: str, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=pyploop_env(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- names


def test_every_public_name_is_there_and_what_type_checkers_see_is_the_same() -> None:
    tree = ast.parse(Path(pyploop.__file__).read_text())
    seen = {
        alias.asname or alias.name
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen | {"__version__"} == set(pyploop.__all__)
    for name in pyploop.__all__:
        assert getattr(pyploop, name) is not None
    assert set(pyploop.__all__) <= set(dir(pyploop))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'cpoy'"):
        pyploop.cpoy  # type: ignore[attr-defined]  # noqa: B018


def test_every_public_name_says_what_it_is() -> None:
    silent = [n for n in pyploop.__all__ if n != "__version__" and not getattr(pyploop, n).__doc__]
    assert silent == []


def test_each_error_has_an_exit_code_of_its_command() -> None:
    kinds = [getattr(pyploop, n) for n in pyploop.__all__ if n.endswith("Error")]
    assert pyploop.PyploopError in kinds
    for kind in kinds:
        assert issubclass(kind, pyploop.PyploopError)
        if kind is not pyploop.MigrateError:
            assert isinstance(kind("x").exit_code, pyploop.ExitCode)
    assert pyploop.MigrateError(pyploop.VzExitCode.LOCKED, "x").exit_code == 20


# ---- what is loaded


def test_importing_pyploop_loads_one_module() -> None:
    code = "import sys; b = set(sys.modules); import pyploop; print(*set(sys.modules) - b)"
    assert in_a_process(code).split() == ["pyploop"]


def test_a_copy_by_the_command_loads_no_more_modules_than_its_budget(
    disk: Path, tmp_path: Path
) -> None:
    code = """\
import sys
from pyploop.cli.main import main
assert main(["-v-2", "copy", "-s", sys.argv[1], "-d", sys.argv[2]]) == 0
print(*sorted(sys.modules))
"""
    # Without `site`, which loads what an environment has for itself.
    home = str(Path(pyploop.__file__).parents[1])
    path = os.pathsep.join([home, sysconfig.get_path("platlib")])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, disk, tmp_path / "copy"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=pyploop_env({"PYTHONPATH": path}),
    )
    names = done.stdout.split()
    ours = [m for m in names if m.startswith("pyploop")]
    assert len(ours) <= MODULES_OF_A_COPY, ours
    assert len(names) - len(ours) <= MODULES_OF_PYTHON, names
    unwanted = {"logging", "asyncio", "rich", "pyploop.report.event_types", "pyploop.migration"}
    assert unwanted.isdisjoint(names)


# ---- what is left alone


def test_a_copy_leaves_the_process_as_it_was_and_prints_nothing(disk: Path, tmp_path: Path) -> None:
    code = """\
import signal, sys, threading
def state():
    handlers = [signal.getsignal(s) for s in signal.valid_signals()]
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook, sys.getswitchinterval()
    return handlers, hooks, sys.path[:], sys.argv[:], sys.stdout, sys.stderr, threading.enumerate()
before = state()
import pyploop
pyploop.copy(sys.argv[1], sys.argv[2])
try:
    pyploop.copy(sys.argv[1], sys.argv[2])
except pyploop.CreateError:
    pass
pyploop.inspect(sys.argv[1])
pyploop.sync([sys.argv[2]])
assert state() == before
"""
    done = subprocess.run(
        [sys.executable, "-c", code, disk, tmp_path / "copy"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=pyploop_env(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_library_neither_prints_nor_ends_the_process() -> None:
    """Programs that are started by their paths, and the `-m` part of libploop, may."""
    programs = (
        *("undo/watchdog", "migration/relay", "system/enclosure", "libploop"),
        *("runtimes/runc/process_trace", "runtimes/runc/criu_gate"),
    )
    found = []
    for path in (ROOT / "pyploop").rglob("*.py"):
        name = str(path.relative_to(ROOT / "pyploop").with_suffix(""))
        if name.startswith("cli/") or name in (*programs, "_kernel_build", "report/schema"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "sys.exit",
                "exit",
                "os._exit",
                "sys.setswitchinterval",
                "breakpoint",
            ):
                found.append(f"{name}:{node.lineno}")
    assert found == []


# ---- copies


def test_a_copy_has_a_result_and_typed_events(disk: Path, tmp_path: Path) -> None:
    seen: list[events.Event] = []
    result = pyploop.copy(disk, tmp_path / "copy", on_event=seen.append)
    assert (tmp_path / "copy").read_bytes() == disk.read_bytes()
    assert (result.source, result.size) == (str(disk), 3 * MIB)
    assert (result.tracker, result.acknowledged) == ("scan", "local")
    assert isinstance(result.rounds[0].sent, int)
    kinds = {type(e) for e in seen}
    assert {events.Sending, events.Phase, events.Round, events.Summary, events.Message} <= kinds
    summary = next(e for e in seen if isinstance(e, events.Summary))
    assert (summary.size, summary.rounds) == (result.size, result.rounds)


def test_a_failure_names_its_file_and_what_to_do(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(pyploop.CreateError) as there:
        pyploop.copy(disk, disk)
    assert (there.value.path, there.value.exit_code) == (str(disk), pyploop.ExitCode.CREATE)
    assert "remove" in (there.value.hint or "")
    with pytest.raises(pyploop.DeviceError) as absent:
        pyploop.copy(tmp_path / "absent", tmp_path / "copy")
    assert absent.value.path == str(tmp_path / "absent")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "options",
    [
        pyploop.CopyOptions(readers=65),
        pyploop.CopyOptions(stops=["nothing"]),
        pyploop.CopyOptions(protocol="packets"),
        pyploop.CopyOptions(tracker="bpf", cluster=4096, timeout=1),
    ],
)
def test_options_that_cannot_be_are_refused(
    disk: Path, tmp_path: Path, options: pyploop.CopyOptions
) -> None:
    with pytest.raises(pyploop.PyploopError):
        pyploop.copy(disk, tmp_path / "copy", options=options)
    assert list(tmp_path.iterdir()) == [disk]


def test_two_copies_at_once_in_threads(disk: Path, tmp_path: Path) -> None:
    results: dict[int, pyploop.CopyResult] = {}

    def one(number: int) -> None:
        results[number] = pyploop.copy(disk, tmp_path / f"copy{number}")

    threads = [threading.Thread(target=one, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1]
    for number in range(2):
        assert (tmp_path / f"copy{number}").read_bytes() == disk.read_bytes()


def test_two_copies_at_once_from_asyncio(disk: Path, tmp_path: Path) -> None:
    async def both() -> list[pyploop.CopyResult]:
        targets = [tmp_path / "one", tmp_path / "two"]
        return await asyncio.gather(*(asyncio.to_thread(pyploop.copy, disk, t) for t in targets))

    assert [r.size for r in asyncio.run(both())] == [3 * MIB] * 2
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == disk.read_bytes()


def test_a_copy_goes_to_a_receiver_through_a_socket(disk: Path, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    received: list[pyploop.ReceiveResult] = []
    with ours, theirs:
        work = threading.Thread(
            target=lambda: received.append(pyploop.receive(tmp_path / "copy", theirs))
        )
        work.start()
        result = pyploop.copy(disk, ours)
        work.join()
    assert (tmp_path / "copy").read_bytes() == disk.read_bytes()
    assert result.acknowledged == "acknowledged"
    assert received[0].native_peer and received[0].image_size == 3 * MIB


def test_the_steps_make_the_same_copy(disk: Path, tmp_path: Path) -> None:
    with pyploop.Copy(disk, tmp_path / "copy") as copying:
        copying.first_pass()
        with disk.open("r+b") as f:
            f.write(b"written meanwhile")
        copying.converge()
        copying.prepare_freeze()
        with copying.frozen():
            copying.last_blocks()
            copying.finish()
        assert copying.result.size == 3 * MIB and copying.sent >= 2 * MIB
    assert (tmp_path / "copy").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize("moment", ["before", "entered", "running"])
def test_another_thread_cancels_a_copy(disk: Path, tmp_path: Path, moment: str) -> None:
    copying = pyploop.Copy(disk, tmp_path / "copy")

    def cancel() -> None:
        thread = threading.Thread(target=copying.cancel)
        thread.start()
        thread.join()

    if moment == "before":
        cancel()
    with pytest.raises(pyploop.CancelledError) as cancelled, copying:
        if moment == "entered":
            cancel()
        copying.first_pass()
        cancel()
        copying.converge()
    assert cancelled.value.exit_code == 29
    assert list(tmp_path.iterdir()) == [disk]


def test_a_copy_that_was_not_entered_says_so(disk: Path, tmp_path: Path) -> None:
    copying = pyploop.Copy(disk, tmp_path / "copy")
    assert copying.recorder is None
    with pytest.raises(pyploop.ParameterError, match="not open"):
        copying.first_pass()


def test_a_programs_interrupt_removes_the_target_and_keeps_its_handler(
    disk: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT)

    def interrupt(event: events.Event) -> None:
        if isinstance(event, events.Phase):
            signal.raise_signal(signal.SIGINT)

    with contextlib.ExitStack() as undo:
        undo.callback(signal.signal, signal.SIGINT, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            pyploop.copy(disk, tmp_path / "copy", on_event=interrupt)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert list(tmp_path.iterdir()) == [disk]


# ---- the rest


def test_what_a_file_is(disk: Path) -> None:
    info = pyploop.inspect(disk)
    assert (info.kind, info.format, info.size) == ("image", "raw", 3 * MIB)
    assert info.tracker is not None and info.tracker.name == "scan"


def test_a_plain_file_cannot_be_tracked(disk: Path) -> None:
    with pytest.raises(pyploop.DeviceControlError, match="cannot be tracked"):
        pyploop.track(disk).__enter__()


def test_sync_goes_on_after_a_failure_and_names_the_first(disk: Path, tmp_path: Path) -> None:
    pyploop.sync([disk, str(disk)])
    pyploop.sync([disk], flush="nothing", drop_cache=True)
    with pytest.raises(pyploop.SyncError) as failed:
        pyploop.sync([tmp_path / "absent", tmp_path / "other", disk])
    assert failed.value.path == str(tmp_path / "absent")
    assert isinstance(failed.value.__cause__, FileNotFoundError)


def test_a_migration_without_a_configuration_is_an_error_of_usage(tmp_path: Path) -> None:
    options = pyploop.MigrationOptions(config=str(tmp_path / "absent"))
    with pytest.raises(pyploop.MigrateError) as failed:
        pyploop.migrate("other", "box", options=options)
    assert failed.value.exit_code == pyploop.VzExitCode.USAGE
    with pytest.raises(pyploop.MigrateError):
        pyploop.recover("box", config_file=str(tmp_path / "absent"))
