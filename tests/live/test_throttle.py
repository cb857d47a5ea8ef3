# SPDX-License-Identifier: Apache-2.0
"""A writer that is too fast is slowed down by its cgroup, and never stays so."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import MIB, is_frozen, loop_device, missing, needs, wait_until
from support_hold import Container, cgroup, container, hierarchy
from support_live import Copy, copy, file_system, sparse_file, work_dir

from pyploop.cli.copy_options import parse_throttle
from pyploop.errors import OpenError, ParameterError
from pyploop.freeze.stoppers import parse_spec
from pyploop.freeze.throttle import Knob, Throttle, find, find_of
from pyploop.report.events import Reporter
from pyploop.undo.journal import ENVIRONMENT
from pyploop.undo.ledger import UndoLedger

BLKIO = Path("/sys/fs/cgroup/blkio")
SIZE = 48 * MIB


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup with a v1 write limit."""
    if not (BLKIO / "blkio.throttle.write_bps_device").exists():
        missing("needs cgroup v1 with blkio.throttle")
    with cgroup(BLKIO, "throttle") as folder:
        yield folder


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UndoLedger]:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "run"))
    made = UndoLedger("a test", Reporter())
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def disk() -> Iterator[str]:
    needs("loop")
    with work_dir() as folder, loop_device(sparse_file(folder / "image", SIZE)) as device:
        yield device


def number(device: str) -> tuple[int, int]:
    rdev = os.stat(device).st_rdev
    return os.major(rdev), os.minor(rdev)


def limits(group: Path) -> str:
    return (group / "blkio.throttle.write_bps_device").read_text()


@pytest.mark.root
@pytest.mark.parametrize("before", [None, 9 * MIB, 4096])
def test_a_limit_is_set_and_what_was_there_is_put_back(
    group: Path, plan: UndoLedger, disk: str, before: int | None
) -> None:
    major, minor = number(disk)
    if before is not None:
        (group / "blkio.throttle.write_bps_device").write_text(f"{major}:{minor} {before}")
    as_it_was = limits(group)
    throttle = Throttle(MIB, str(group), Reporter())
    throttle.prepare(plan, (major, minor), [])
    throttle.apply()
    throttle.apply()
    # A lower limit of somebody else's is left as it is.
    assert limits(group) == f"{major}:{minor} {4096 if before == 4096 else MIB}\n"
    throttle.remove()
    throttle.remove()
    assert limits(group) == as_it_was


@pytest.mark.root
def test_synchronous_writes_are_slowed_down_to_the_rate(
    group: Path, plan: UndoLedger, disk: str
) -> None:
    throttle = Throttle(2 * MIB, str(group), Reporter())
    throttle.prepare(plan, number(disk), [])
    throttle.apply()
    dd = f"dd if=/dev/zero of={disk} bs=64k count=48 oflag=direct conv=notrunc 2>/dev/null"
    start = time.monotonic()
    subprocess.run(["/bin/sh", "-c", f"echo $$ >{group}/cgroup.procs; {dd}"], check=True)
    # 3 MiB at 2 MiB/s; the kernel lets a slice or two pass at first.
    assert time.monotonic() - start > 1.0


# ---- in a copy


class Bench:
    def __init__(self, stack: ExitStack, folder: Path, group: Path) -> None:
        root = hierarchy(1)
        if root is None:
            missing("needs cgroup v1 with a freezer")
        self.folder, self.target = folder, folder / "target"
        self.device = stack.enter_context(loop_device(sparse_file(folder / "image", SIZE)))
        self.point = stack.enter_context(file_system(self.device, folder / "m"))
        self.container: Container = stack.enter_context(
            container(root, "throttle", self.point, folder / "beat")
        )
        for pid in (self.container.cgroup / "cgroup.procs").read_text().split():
            (group / "cgroup.procs").write_text(pid)
        # No freeze fits into a microsecond.
        self.options = ["--freeze", f"cgroup:{self.container.cgroup}"]
        self.options += ["--throttle", "256K", "--max-freeze", "1us"]


@pytest.fixture
def bench(group: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    needs("loop", "mkfs.ext4")
    with ExitStack() as stack:
        folder = stack.enter_context(work_dir())
        monkeypatch.setenv(ENVIRONMENT, str(folder / "run"))
        yield Bench(stack, folder, group)


@pytest.mark.root
@pytest.mark.parametrize("group_kill", [False, True])
def test_a_throttled_writer_is_let_go_when_the_copy_is_killed(
    bench: Bench, group: Path, group_kill: bool
) -> None:
    major, minor = number(bench.device)
    with Copy(bench.device, bench.target, *bench.options, via="local") as running:
        wait_until(lambda: limits(group), "it is throttled")
        assert limits(group) == f"{major}:{minor} {256 << 10}\n"
        if group_kill:
            os.killpg(running.sender.pid, signal.SIGKILL)
        else:
            running.sender.kill()
        wait_until(lambda: not limits(group), "it is let go", 2)
        running.sender.wait()
    assert bench.container.running() and not is_frozen(bench.point)
    wait_until(lambda: not list((bench.folder / "run").glob("*")), "the journal has gone")


@pytest.mark.root
@pytest.mark.parametrize("then", ["abort", "freeze"])
def test_a_throttled_writer_is_let_go_when_the_copy_ends(
    bench: Bench, group: Path, then: str
) -> None:
    free = f'test -z "$(cat {group}/blkio.throttle.write_bps_device)"'
    options = [*bench.options, "--deadline", "1.5", "--on-deadline", then, "--resume"]
    got = copy(bench.device, bench.target, *options, "--before-thaw", free, via="local")
    assert got.code == (14 if then == "abort" else 0), got.errors
    assert "Throttled" in got.errors
    assert limits(group) == ""
    assert bench.container.running() and not is_frozen(bench.point)


# ---- which cgroup


@pytest.mark.root
def test_the_cgroup_is_that_of_the_container_unless_one_is_named(bench: Bench, group: Path) -> None:
    name = group.relative_to(BLKIO)
    for given in (str(group), str(name), f"/{name}"):
        assert find(given, "7:0").folder == group
    specs = [parse_spec("fs"), parse_spec(f"cgroup:{bench.container.cgroup}")]
    assert find_of(specs, "7:0").folder == group
    with pytest.raises(ParameterError, match="needs a cgroup"):
        find_of([parse_spec("cmd:x")], "7:0")
    for bad in ("pyploop-none", "/", f"x/../{name}"):
        with pytest.raises(OpenError, match="no cgroup"):
            find(bad, "7:0")
    with pytest.raises(ParameterError, match="plain file"):
        Throttle(1, str(group), Reporter()).prepare(UndoLedger("x", Reporter()), None, [])


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("", None),
        ("7:1 rbps=max wbps=5 riops=max wiops=max\n", None),
        ("7:1 wbps=5\n7:0 rbps=max wbps=1048576 riops=max wiops=max\n", 1048576),
        ("7:0 rbps=1 wbps=max riops=max wiops=max\n", None),
    ],
)
def test_a_v2_limit_is_read_and_written_as_the_kernel_has_it(
    tmp_path: Path, text: str, limit: int | None
) -> None:
    (tmp_path / "io.max").write_text(text)
    knob = Knob(tmp_path, True, "7:0")
    assert knob.read() == limit
    assert [knob.value(1048576), knob.value(None)] == ["7:0 wbps=1048576", "7:0 wbps=max"]


def test_a_throttle_is_a_rate_and_perhaps_a_cgroup() -> None:
    assert parse_throttle("1M") == (1 << 20, None)
    assert parse_throttle("64K:/a:b") == (65536, "/a:b")
    for bad in ("", "0", "x:1", ":a"):
        with pytest.raises(ValueError):
            parse_throttle(bad)
