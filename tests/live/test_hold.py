# SPDX-License-Identifier: Apache-2.0
"""What is stopped for the last blocks: by cgroup, vzctl, command, in order,
and how it is undone.  The container is a real process group that writes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import (
    MIB,
    ROOT,
    is_frozen,
    loop_device,
    missing,
    needs,
    pyploop_cmd,
    pyploop_env,
    wait_until,
)
from support_hold import Container, container, freeze, frozen, hierarchy, thaw
from support_live import Copy, copy, file_system, sparse_file, succeeded, work_dir

from pyploop.errors import OpenError, ParameterError
from pyploop.freeze import cgroup as freezer
from pyploop.undo.journal import ENVIRONMENT

pytestmark = pytest.mark.root
SIZE = 48 * MIB
VZCTL = ("--freeze", "vzctl:101")


@dataclass
class Bench:
    folder: Path
    device: str
    point: Path
    container: Container

    @property
    def target(self) -> Path:
        return self.folder / "target"

    @property
    def group(self) -> Path:
        """What is frozen: the cgroup above the container's."""
        return self.container.cgroup.parent

    @property
    def spec(self) -> tuple[str, str]:
        return ("--freeze", f"cgroup:{self.group}")

    def as_found(self) -> None:
        """Running and thawed, no journal, no target."""
        assert self.container.running(), "the container runs"
        assert not is_frozen(self.point)
        assert not list((self.folder / "run").glob("*")), "no journal"
        assert not self.target.exists()

    def finished(self) -> None:
        """Complete, whatever happened then."""
        assert self.target.stat().st_size == SIZE
        self.target.unlink()


def root_of(version: int) -> Path:
    root = hierarchy(version)
    if root is None:
        missing(f"needs cgroup v{version} with a freezer")
    return root


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def bench(version: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    yield from make_bench(version, monkeypatch)


@pytest.fixture
def v1(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    yield from make_bench(1, monkeypatch)


@pytest.fixture
def v2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    yield from make_bench(2, monkeypatch)


def make_bench(version: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    needs("loop", "mkfs.ext4")
    root = root_of(version)
    with work_dir() as folder:
        monkeypatch.setenv(ENVIRONMENT, str(folder / "run"))
        image = sparse_file(folder / "image", SIZE)
        with (
            loop_device(image) as device,
            file_system(device, folder / "m") as point,
            container(root, "hold", point, folder / "beat") as made,
        ):
            yield Bench(folder, device, point, made)


# ---- cgroups


def test_a_frozen_container_stays_so_after_success_and_its_file_system_is_thawed(
    bench: Bench,
) -> None:
    got = copy(bench.device, bench.target, *bench.spec)
    succeeded(got)
    assert frozen(bench.group) and not bench.container.running(0.1)
    assert not is_frozen(bench.point)
    assert not list((bench.folder / "run").glob("*"))
    bench.finished()
    thaw(bench.group)
    bench.as_found()


def test_resume_asks_for_the_container_to_go_on(bench: Bench) -> None:
    check = (
        f"grep -q -e FROZEN -e 'frozen 1' {bench.group}/freezer.state {bench.group}/cgroup.events"
    )
    got = copy(bench.device, bench.target, *bench.spec, "--resume", "--before-thaw", check)
    succeeded(got)
    bench.finished()
    bench.as_found()


def test_a_busy_container_is_frozen_again_and_again_without_a_deadlock(bench: Bench) -> None:
    """Its writers sit in fsync of the very file system that is frozen next."""
    for _ in range(4):
        succeeded(copy(bench.device, bench.target, *bench.spec, "--resume", via="local"))
        bench.finished()
    bench.as_found()


@pytest.mark.parametrize("how", ["command", "receiver"])
def test_after_a_failure_the_container_runs(bench: Bench, how: str) -> None:
    marker = bench.folder / "marker"
    fail = f"{bench.spec[1]}", "-F", f": >{marker}; {'false' if how == 'command' else 'sleep 0.3'}"
    with Copy(bench.device, bench.target, "--freeze", *fail) as running:
        wait_until(marker.exists, "it is stopped")
        if how == "receiver":
            assert running.receiver is not None
            running.receiver.kill()
        got = running.wait(20)
    assert got.code == (12 if how == "command" else 7), got.errors
    assert len([x for x in got.errors.splitlines() if "Sending" not in x]) >= 1
    bench.as_found()


def test_what_another_process_has_frozen_stays_frozen(bench: Bench) -> None:
    freeze(bench.group)
    got = copy(bench.device, bench.target, *bench.spec, "--resume")
    succeeded(got)
    assert frozen(bench.group)
    bench.finished()
    thaw(bench.group)
    bench.as_found()


def test_a_container_that_is_thawed_during_the_last_blocks_fails_the_copy(bench: Bench) -> None:
    word = "THAWED" if (bench.group / "freezer.state").exists() else "0"
    knob = bench.group / ("freezer.state" if word == "THAWED" else "cgroup.freeze")
    got = copy(bench.device, bench.target, *bench.spec, "-F", f"echo {word} >{knob}")
    assert got.code == 14, got.errors
    assert "was thawed by another process during the last blocks" in got.errors
    bench.as_found()


def test_writers_that_wait_for_a_frozen_file_system_cannot_be_frozen_by_v2(v2: Bench) -> None:
    # The command gives the writers the time to run into the frozen file system.
    wait = "--freeze", "cmd:sleep 0.3"
    options = ["--freeze", "fs", *wait, *v2.spec, "--freeze-limit", "3"]
    got = copy(v2.device, v2.target, *options)
    assert got.code == 12, got.errors
    assert "did not freeze within" in got.errors
    assert "python" in got.errors and "uninterruptible wait" in got.errors
    v2.as_found()


def test_a_cgroup_that_holds_the_copy_itself_is_refused(bench: Bench) -> None:
    command = [*pyploop_cmd(), "copy", "-s", bench.device, "-d", str(bench.target), *bench.spec]
    script = f"echo $$ >{bench.group}/cgroup.procs; exec {shlex.join(command)}"
    done = subprocess.run(
        ["/bin/sh", "-c", script], env=pyploop_env(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, "this process is in it" in done.stderr) == (38, True), done.stderr
    bench.as_found()


def test_a_sender_that_hangs_is_undone_by_the_watchdog_and_never_ends_the_stream(
    bench: Bench,
) -> None:
    """The stop command stops its parent, the sender, when all is held."""
    marker = bench.folder / "marker"
    options = [*bench.spec, "--freeze", "fs", "-F", f": >{marker}; kill -STOP $PPID"]
    with Copy(bench.device, bench.target, *options, "--freeze-limit", "2") as running:
        wait_until(marker.exists, "all is held")
        wait_until(lambda: not frozen(bench.group), "the watchdog has undone it")
        assert bench.container.running()
        running.sender.send_signal(signal.SIGCONT)
        got = running.wait(20)
    assert (got.code, got.receiver_code) == (14, 6), got.errors
    bench.as_found()


def test_a_cgroup_is_found_by_its_folder_and_by_its_path_in_the_hierarchy(bench: Bench) -> None:
    root = bench.group.parent
    for path in (str(bench.group), bench.group.name, f"/{bench.group.name}"):
        assert freezer.find(path).folder == bench.group
    inner = freezer.find(f"{bench.group.name}/inner")
    assert inner.folder == bench.container.cgroup and len(inner.processes()) == 2
    for path in ("", "/", "pyploop-none", f"../{root.name}/{bench.group.name}"):
        with pytest.raises(OpenError, match="no cgroup"):
            freezer.find(path)


def test_of_two_cgroups_with_one_path_the_one_with_processes_counts(v1: Bench) -> None:
    other = root_of(2) / v1.group.name
    other.mkdir()
    try:
        assert freezer.find(v1.group.name).folder == v1.group
        (v1.folder / "twin").mkdir()
        with container_in(other, v1), pytest.raises(ParameterError, match="is both"):
            freezer.find(v1.group.name)
    finally:
        other.rmdir()


def container_in(folder: Path, bench: Bench) -> subprocess.Popen[bytes]:
    """A process in that cgroup; a context manager."""

    class Sleeper(subprocess.Popen[bytes]):
        def __exit__(self, *exc: object) -> None:
            self.kill()
            super().__exit__(None, None, None)

    script = f"echo $$ >{folder}/cgroup.procs; : >{bench.folder}/in; exec sleep 60"
    made = Sleeper(["/bin/sh", "-c", script])
    wait_until((bench.folder / "in").exists, "it is in the cgroup")
    return made


# ---- commands


def test_commands_run_in_order_and_are_undone_in_reverse(v1: Bench) -> None:
    log = v1.folder / "log"

    def say(word: str) -> str:
        return f"echo {word} >>{log}"

    options = ["--freeze", f"cmd:{say('a')}", "--undo", say("-a"), *v1.spec]
    options += ["-F", say("b"), "--undo", say("-b")]
    succeeded(copy(v1.device, v1.target, *options))
    assert log.read_text() == "a\nb\n"
    v1.finished()
    thaw(v1.group)
    log.unlink()
    succeeded(copy(v1.device, v1.target, *options, "--resume"))
    assert log.read_text() == "a\nb\n-b\n-a\n"
    v1.finished()
    log.unlink()
    options[-3] += "; false"
    got = copy(v1.device, v1.target, *options)
    assert (got.code, log.read_text()) == (12, "a\nb\n-b\n-a\n"), got.errors
    v1.as_found()


def test_a_stop_command_that_nothing_undoes_is_named_after_a_failure(v1: Bench) -> None:
    got = copy(v1.device, v1.target, "-F", ": stopped", "--freeze", "cmd:false", via="local")
    assert got.code == 12, got.errors
    assert (
        "what the stop command ': stopped' did was not undone (no --undo was given)" in got.errors
    )
    v1.as_found()


def test_an_undo_that_fails_is_reported_and_can_be_tried_again_by_hand(v1: Bench) -> None:
    ok = v1.folder / "ok"
    undo = f"test -e {ok}"
    options = ["-F", "true", "--undo", undo, "--before-thaw", "false", "--sync-wait", "0"]
    got = copy(v1.device, v1.target, *options, via="local")
    assert got.code == 12, got.errors
    (journal,) = (v1.folder / "run").iterdir()
    assert f"exit code 1 (by hand: pyploop thaw {journal.stem})" in got.errors
    # What was complete by then stays, and the message says so.
    assert f"{v1.target} is complete and was kept" in got.errors
    v1.target.unlink()
    ok.touch()
    done = subprocess.run(
        [*pyploop_cmd(), "thaw", journal.stem], env=pyploop_env(), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    v1.as_found()


# ---- vzctl (a stand-in: tests/vzctl)


@pytest.fixture
def vz(v1: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    state, programs = v1.folder / "vz", v1.folder / "bin"
    state.mkdir()
    programs.mkdir()
    (programs / "vzctl").symlink_to(ROOT / "tests" / "vzctl")
    (state / "101").write_text(str(v1.group))
    monkeypatch.setenv("VZCTL_STANDIN", str(state))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return v1


def calls(bench: Bench) -> list[str]:
    return (bench.folder / "vz/calls").read_text().splitlines()


def test_vzctl_suspends_and_leaves_the_rest_to_the_orchestrator(vz: Bench) -> None:
    (vz.folder / "vz/101.lck").touch()
    succeeded(copy(vz.device, vz.target, *VZCTL))
    assert calls(vz) == ["status 101", "--skiplock chkpnt 101 --suspend"]
    assert frozen(vz.group) and not is_frozen(vz.point)
    vz.finished()
    # Suspended by somebody else now, so it is left so.
    succeeded(copy(vz.device, vz.target, *VZCTL, "--resume"))
    assert calls(vz)[2:] == ["status 101"] and frozen(vz.group)
    vz.finished()
    thaw(vz.group)
    succeeded(copy(vz.device, vz.target, *VZCTL, "--resume"))
    assert calls(vz)[-1] == "--skiplock chkpnt 101 --resume"
    vz.finished()
    vz.as_found()


@pytest.mark.parametrize(
    ("fail", "code", "words"),
    [
        ("suspend 9", 17, "locked by another"),
        ("suspend 16", 12, "the checkpoint failed"),
        ("suspend 31", 12, "the container is not running"),
        ("suspend hang", 12, "vzctl --skiplock chkpnt 101 --suspend did not end within"),
        ("suspend garbage", 12, "vzctl exited with 255"),
        ("status garbage", 12, "not with a status"),
    ],
)
def test_each_failure_of_vzctl_is_a_clear_error_and_a_running_container(
    vz: Bench, fail: str, code: int, words: str
) -> None:
    (vz.folder / "vz/fail").write_text(fail)
    limit = ("--freeze-limit", "2") if fail == "suspend hang" else ()
    got = copy(vz.device, vz.target, *VZCTL, *limit, via="local")
    lines = [x for x in got.errors.splitlines() if words in x]
    assert (got.code, len(lines)) == (code, 1), got.errors
    assert "Traceback" not in got.errors
    resumes = calls(vz).count("--skiplock chkpnt 101 --resume")
    assert resumes == (fail in ("suspend 16", "suspend hang", "suspend garbage"))
    vz.as_found()


def test_without_skiplock_a_locked_container_is_not_touched(vz: Bench) -> None:
    (vz.folder / "vz/101.lck").touch()
    got = copy(vz.device, vz.target, "--freeze", "vzctl:101,lock", via="local")
    assert (got.code, "locked by another" in got.errors) == (17, True), got.errors
    assert calls(vz)[-1] == "chkpnt 101 --suspend", "nothing is resumed"
    vz.as_found()


def test_a_stop_spec_that_cannot_work_ends_the_copy_before_anything_is_stopped(
    vz: Bench,
) -> None:
    for spec, code, words in (
        ("vzctl:7", 12, "container 7 is not running"),
        ("vzctl:", 38, "not a stop spec"),
        ("vzctl:-x", 38, "expected vzctl:CTID"),
        ("vzctl:101,what", 38, "expected vzctl:CTID"),
        ("cgroup:pyploop-none", 4, "no cgroup"),
        ("fs:/proc/self", 38, "neither a mount point"),
        ("fs:/nowhere", 4, "/nowhere"),
        ("what:x", 38, "not a stop spec"),
    ):
        got = copy(vz.device, vz.target, "--freeze", spec, via="local")
        assert (got.code, words in got.errors) == (code, True), got.errors
    vz.as_found()
