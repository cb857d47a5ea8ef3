# SPDX-License-Identifier: Apache-2.0
"""Units, rounds, D1 control frames, events, mountinfo, transports, the sink,
and the trackers without a kernel."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support

from pyploop._core import Extents
from pyploop.cli.main import parse_globals, signals_raise
from pyploop.diskcopy.options import Options
from pyploop.diskcopy.sender import Sender
from pyploop.diskcopy.target_file import Sink
from pyploop.diskcopy.target_registry import FileOutput
from pyploop.disks.opening import open_source
from pyploop.disks.source import Source
from pyploop.errors import (
    CancelledError,
    CreateError,
    DeviceControlError,
    Interrupted,
    OpenError,
    ParameterError,
    ProtocolError,
    ReadError,
    WriteError,
)
from pyploop.freeze import FileSystems
from pyploop.report.events import JsonRenderer, Reporter, TextRenderer
from pyploop.system import cpu, descriptors, kernel, mount_table
from pyploop.system.mount_table import Mount
from pyploop.system.sysblock import BlockDevice
from pyploop.system.worker import run_cancellable, wait_for
from pyploop.trackers.dm import DmTracker, has_tracking
from pyploop.trackers.scan import ScanTracker
from pyploop.units import MIB, format_size, parse_size, parse_time
from pyploop.wire import d1

# ---- units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 65536),
        ("1MiB", 1 << 20),
        ("2.5G", 5 << 29),
        ("1tb", 1 << 40),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "K", "1X", "1e3", "nan", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["9223372036854775808", "8388608T", "9" * 400])
def test_a_size_that_no_file_has_is_refused(text: str) -> None:
    assert parse_size("8388607T") == 8388607 << 40
    with pytest.raises(ValueError, match="is more than 8 EiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["1728001", "481h", "9" * 400])
def test_a_time_that_no_wait_takes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is more than 20 days"):
        parse_time(text)
    assert parse_time("480h") == 20 * 86400


def test_times_are_read_and_sizes_are_written() -> None:
    assert [parse_time(t) for t in ("5", "0.5s", "200ms", "2m", "3us")] == [5, 0.5, 0.2, 120, 3e-6]
    with pytest.raises(ValueError, match="is not a time"):
        parse_time("-5")
    assert [format_size(n) for n in (17, 4096, 1 << 31, 1 << 50)] == [
        "17 B", "4.0 KiB", "2.0 GiB", "1024.0 TiB",
    ]  # fmt: skip


# ---- D1


def test_control_frames_have_the_bytes_of_the_c_tool() -> None:
    assert d1.end() == bytes.fromhex("3dacc04c 00000000 0000000000000000")
    assert d1.sync(b"abcd") == bytes.fromhex("3dacc04c 04000000 0000000000000000") + b"abcd"
    assert d1.data(1 << 40, b"xyz") == support.d1_frame(1 << 40, b"xyz")
    for bad in (b"", b"abc", b"abcde"):
        with pytest.raises(ValueError, match="4 bytes"):
            d1.sync(bad)
    for bad in (b"", b"abcd"):
        with pytest.raises(ValueError, match="cannot have"):
            d1.data(0, bad)
    assert len(d1.HELLO_REPLY) == len(d1.SUCCESS) == len(d1.FAILURE) == d1.REPLY_SIZE


# ---- events


def test_global_verbosity_is_ploops() -> None:
    assert parse_globals(["-v", "-vv", "copy", "-v"]) == (6, ["copy", "-v"])
    assert parse_globals(["-v-1", "copy"]) == (-1, ["copy"])
    assert parse_globals(["-v7", "-v"]) == (8, [])
    with pytest.raises(ParameterError):
        parse_globals(["-q"])


@pytest.mark.parametrize(
    ("level", "out", "err"),
    [
        (-2, "", ""),
        (-1, "", "bad\n"),
        (0, "note\n", "Sending /image\nbad\n"),
        (3, "note\ninfo\n", "Sending /image\nbad\n"),
        (4, "[ 7.000042] note\n[ 7.000042] info\n[ 7.000042] detail\n",
         "[ 7.000042] Sending /image\n[ 7.000042] bad\n"),
    ],
)  # fmt: skip
def test_text_follows_ploops_levels_and_timestamps(level: int, out: str, err: str) -> None:
    clock = iter([100.0, *[107.0000421] * 9])
    report = Reporter(lambda: next(clock))
    to, errors = io.StringIO(), io.StringIO()
    report.add(TextRenderer(level, to, errors))
    report.event("sending", image="/image")
    report.note("note")
    report.info("info")
    report.detail("detail")
    report.error("bad")
    assert (to.getvalue(), errors.getvalue()) == (out, err)


def test_each_event_is_one_json_object_with_its_schema() -> None:
    report, out = Reporter(), io.StringIO()
    report.add(JsonRenderer(out))
    report.event("round", number=1, sent=5)
    report.event("progress", done=1, dirty="")
    report.info("not an event")
    report.error("bad\nthing \udcff")
    records = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [r["event"] for r in records] == ["round", "error"]
    assert all(r["schema"] == "pyploop.events/1" and r["time"] >= 0 for r in records)
    assert (records[0]["number"], records[1]["message"]) == (1, "bad\\nthing \\udcff")


def test_the_hint_of_a_failure_follows_its_message_and_has_a_field_of_its_own() -> None:
    report, errors, out = Reporter(), io.StringIO(), io.StringIO()
    report.add(TextRenderer(-1, None, errors))
    report.add(JsonRenderer(out))
    report.failure(OpenError("cannot open x", hint="mount\nit"))
    report.failure(OpenError("cannot open y"))
    assert errors.getvalue() == "cannot open x. Hint: mount\\nit\ncannot open y\n"
    with_hint, without = (json.loads(line) for line in out.getvalue().splitlines())
    assert (with_hint["message"], with_hint["hint"]) == ("cannot open x", "mount\\nit")
    assert without["message"] == "cannot open y" and "hint" not in without


def test_a_log_that_nobody_reads_does_not_stop_the_copy() -> None:
    class Full(io.StringIO):
        def write(self, text: str, /) -> int:
            raise OSError(errno.ENOSPC, "full")

    report = Reporter()
    report.add(TextRenderer(9, Full(), Full()))
    report.add(JsonRenderer(Full()))
    read = io.StringIO()
    report.add(TextRenderer(9, read, read))
    report.error("bad")
    report.note("good")
    assert read.getvalue().count("\n") == 2, "the others get it all the same"


# ---- mountinfo


@pytest.mark.parametrize(
    ("escaped", "name"),
    [
        ("/a\\040b", "/a b"),
        ("/t\\011n\\012b\\134", "/t\tn\nb\\"),
        ("/caf\u00e9", "/caf\u00e9"),
        ("/nb\u00a0sp", "/nb\u00a0sp"),
        ("/ls\u2028x\x0b\x0c\x1c\x85y", "/ls\u2028x\x0b\x0c\x1c\x85y"),
        ("/cr\rx", "/cr\rx"),
        ("/\\040-\\040", "/ - "),
    ],
)
def test_a_mount_is_found_whatever_its_name(tmp_path: Path, escaped: str, name: str) -> None:
    device = BlockDevice("sda1", (8, 1), "sda", (8, 0), 0, 0)
    text = f"""22 1 0:21 / /proc rw - proc proc rw
30 1 8:1 / {escaped} rw,relatime shared:1 master:2 - ext4 /dev/sda1 rw
31 1 8:1 /sub /elsewhere rw - ext4 /dev/sda1 rw
nonsense
"""
    (tmp_path / "mountinfo").write_bytes(text.encode())
    found = mount_table.mounts_of([device], tmp_path / "mountinfo")
    assert [(os.fsencode(m.point), m.fstype) for m in found] == [(name.encode(), "ext4")]


def test_a_mount_point_that_is_not_utf8_is_found(tmp_path: Path) -> None:
    device = BlockDevice("sda", (8, 0), "sda", (8, 0), 0, 0)
    (tmp_path / "m").write_bytes(b"1 1 8:0 / /x\xff rw - xfs /dev/sda rw\n")
    assert os.fsencode(mount_table.mounts_of([device], tmp_path / "m")[0].point) == b"/x\xff"


@pytest.mark.root
def test_the_wrong_file_system_is_never_frozen_when_a_mount_hides_another(tmp_path: Path) -> None:
    support.needs("root", "loop", "mkfs.ext4")
    for name in "ab":
        support.run("truncate", "-s", "16M", tmp_path / name)
        support.run("mkfs.ext4", "-q", tmp_path / name)
    with (
        support.loop_device(tmp_path / "a") as a,
        support.loop_device(tmp_path / "b") as b,
        support.mounted(a, tmp_path / "m"),
        support.mounted(b, tmp_path / "m"),
        pytest.raises(OpenError, match="hidden"),
    ):
        source = open_source(a)
        try:
            FileSystems(source.mounts, Reporter()).close()
        finally:
            source.close()


# ---- transports


@pytest.mark.invariant(number=6)
def test_reading_is_exact_and_ends_with_the_peer_or_the_deadline() -> None:
    r, w = os.pipe()
    os.write(w, b"12345")
    late = time.monotonic() + 5
    assert descriptors.read_exactly(r, 3, lambda: late, "x") == b"123"
    soon = time.monotonic() + 0.05
    with pytest.raises(ReadError, match="no answer"):
        descriptors.read_exactly(r, 3, lambda: soon, "x")
    os.close(w)
    with pytest.raises(ProtocolError, match="after 0 bytes"):
        descriptors.read_exactly(r, 3, lambda: late, "x")
    os.close(r)


def test_a_copy_cancelled_by_another_thread_fails_with_its_own_exit_code(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 8192)
    out = FileOutput(os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT))
    source = open_source(str(tmp_path / "source"))
    with (
        contextlib.closing(source),
        Sender(source, ScanTracker(source), out, Options(), Reporter()) as sender,
    ):
        sender.cancel()
        with pytest.raises(CancelledError) as caught:
            sender.first_pass()
    assert caught.value.exit_code == 29
    os.close(out.fd)


def test_a_signal_that_comes_inside_a_destructor_is_not_lost() -> None:
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught, signals_raise():
        Dying()
        time.sleep(20)
    assert caught.value.signum == signal.SIGINT


def test_writing_to_a_peer_that_is_gone_is_an_error_and_no_signal() -> None:
    a, b = socket.socketpair()
    b.close()
    with a, pytest.raises(WriteError):
        descriptors.write_all(a.fileno(), b"x", "x")


def test_nonblocking_leaves_the_shared_description_alone() -> None:
    r, w = os.pipe()
    with descriptors.nonblocking(w) as fd:
        assert os.get_blocking(w)
        assert not os.get_blocking(fd)
        os.write(fd, b"x")
    assert os.read(r, 1) == b"x"
    os.close(r)
    with descriptors.nonblocking(w) as fd:  # no reader: cannot be opened anew
        assert not os.get_blocking(fd)
    assert os.get_blocking(w)
    os.close(w)


def test_a_stream_is_a_pipe_or_a_socket(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w") as f, pytest.raises(ParameterError):
        descriptors.check_stream(f.fileno(), "-i")
    with pytest.raises(ParameterError, match="-f 999"):
        descriptors.check_stream(999, "-f")


# ---- sink


@pytest.fixture(params=["nameless", "named"])
def any_sink(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With O_TMPFILE, and on a file system that has none."""
    if request.param == "named":
        real = os.open

        def no_tmpfile(path: Any, flags: int, *args: Any, **more: Any) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no O_TMPFILE")
            return real(path, flags, *args, **more)

        monkeypatch.setattr(os, "open", no_tmpfile)
    return str(request.param)


@pytest.mark.invariant(number=7)
def test_a_target_has_no_name_until_it_is_complete(tmp_path: Path, any_sink: str) -> None:
    with Sink(str(tmp_path / "image")) as sink:
        os.write(sink.fd, b"data")
        assert not (tmp_path / "image").exists()
        assert (sink.temporary is None) == (any_sink == "nameless")
        assert len(list(tmp_path.iterdir())) == (any_sink == "named")
        sink.set_size(6)
        sink.commit()
    assert (tmp_path / "image").read_bytes() == b"data\0\0"
    assert list(tmp_path.iterdir()) == [tmp_path / "image"]
    assert (tmp_path / "image").stat().st_mode & 0o7777 == 0o600


@pytest.mark.invariant(number=7)
def test_an_unfinished_target_leaves_nothing(tmp_path: Path, any_sink: str) -> None:
    with pytest.raises(ZeroDivisionError), Sink(str(tmp_path / "image")):
        raise ZeroDivisionError
    with Sink(str(tmp_path / "image")):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 255, "\u6f22" * 85])
def test_the_longest_names_work(tmp_path: Path, any_sink: str, name: str) -> None:
    with Sink(str(tmp_path / name)) as sink:
        sink.commit()
    assert (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("n" * 256, "too long"), ("no/image", "No such"), ("f/image", "Not a dir"), ("f", "exists")],
)
def test_a_target_that_cannot_be_made_is_an_error_of_its_own(
    tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(CreateError, match=words):
        Sink(str(tmp_path / name))


# ---- worker, freeze


def test_an_exception_of_the_work_comes_out_and_a_signal_cancels_it() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cancellable(lambda: 1 // 0)
    calls: list[str] = []

    def tick() -> None:
        raise Interrupted(2)

    def work() -> None:
        while not calls:
            time.sleep(0.01)
        calls.append("done")

    with pytest.raises(Interrupted):
        run_cancellable(work, lambda: calls.append("cancel"), tick)
    assert calls == ["cancel", "done"]


@pytest.mark.parametrize("pidfds", [True, False])
def test_a_process_is_waited_for_until_it_ends_or_the_time_is_over(
    pidfds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pidfds:

        def forbidden(pid: int) -> int:
            raise PermissionError(errno.EPERM, "forbidden")

        monkeypatch.setattr(os, "pidfd_open", forbidden)
    with subprocess.Popen(["sh", "-c", "read x; exit 3"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        with pytest.raises(subprocess.TimeoutExpired):
            wait_for(process, 0.05)
        process.stdin.close()
        assert wait_for(process, 60) == 3
        assert wait_for(process, None) == 3


@pytest.mark.invariant(number=3)
def test_a_signal_at_the_moment_of_the_freeze_still_thaws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[str] = []

    def fifreeze(fd: int, path: str) -> None:
        frozen.append(path)
        raise Interrupted(15)  # the handler runs as the ioctl returns

    monkeypatch.setattr(kernel, "fifreeze", fifreeze)
    monkeypatch.setattr(kernel, "fithaw", lambda fd, path: frozen.remove(path))
    systems = FileSystems([Mount(str(tmp_path), "ext4", "/dev/x")], Reporter())
    with pytest.raises(Interrupted):
        systems.freeze()
    systems.close()
    assert frozen == []


def test_a_file_system_that_was_frozen_before_is_left_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fifreeze(fd: int, path: str) -> None:
        raise OSError(errno.EBUSY, "busy")

    thawed: list[str] = []
    monkeypatch.setattr(kernel, "fifreeze", fifreeze)
    monkeypatch.setattr(kernel, "fithaw", lambda fd, path: thawed.append(path))
    systems = FileSystems([Mount(str(tmp_path), "ext4", "/dev/x")], Reporter())
    systems.freeze()
    systems.close()
    assert thawed == []


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder) / "f"


def test_a_file_on_tmpfs_that_has_all_its_pages_is_not_searched_for_holes(
    on_tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_tmpfs.write_bytes(b"x" * (MIB + 5))
    with contextlib.closing(open_source(str(on_tmpfs))) as source:
        with monkeypatch.context() as m:
            m.setattr(os, "lseek", None)
            assert source.holes() == ([(0, MIB + 5)], [])
        os.truncate(on_tmpfs, MIB)
        with on_tmpfs.open("r+b") as f:
            f.truncate(MIB + 5)
        assert source.holes() == ([(0, MIB)], [(MIB, MIB + 5)])


def test_what_is_allocated_elsewhere_may_be_a_hole(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, MIB)
        found = os.lseek(f.fileno(), 0, os.SEEK_HOLE)
    assert os.stat(tmp_path / "f").st_blocks * 512 >= MIB
    with contextlib.closing(open_source(str(tmp_path / "f"))) as source:
        # As the file system has it: ext4 and xfs call all of it a hole.
        assert source.holes() == (([], [(0, MIB)]) if found == 0 else ([(0, MIB)], []))


# ---- trackers without a kernel


def test_scan_compares_all_data_and_all_holes(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as f:
        f.truncate(1 << 20)
        f.seek(512 << 10)
        f.write(b"x" * 4096)
    source = open_source(str(tmp_path / "f"))
    batches = ScanTracker(source).take()
    source.close()
    assert all(b.changed for b in batches)
    assert [b.holes for b in batches] == [False, True]
    whole = sorted(pair for b in batches for pair in b.extents)
    assert whole[0][0] == 0
    assert whole[-1][1] == 1 << 20
    assert all(a[1] == b[0] for a, b in itertools.pairwise(whole))
    assert sum(b.extents.bytes for b in batches) == 1 << 20


class Target:
    """A device-mapper target that tracks."""

    def __init__(self, answers: list[str]) -> None:
        self.answers, self.calls = answers, list[list[str]]()

    def __call__(self, args: list[str]) -> str:
        self.calls.append(args)
        if args[-1] == "tracking_get_next":
            return self.answers.pop(0) if self.answers else ""
        return ""


@pytest.fixture
def dm_source(monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setattr("pyploop.trackers.dm.device_name", lambda source: "ct101")
    dev = BlockDevice("dm-0", (253, 0), "dm-0", (253, 0), 0, (5 << 20) + 512)
    return Source("/dev/dm-0", "block", (5 << 20) + 512, -1, block=dev)


def test_dm_asks_until_nothing_is_dirty(dm_source: Source) -> None:
    run = Target(["3\n", "0\n", "5\n", ""])
    t = DmTracker(dm_source, run=run)
    t.start()
    (batch,) = t.take()
    assert list(batch.extents) == [(0, 1 << 20), (3 << 20, 4 << 20), (5 << 20, (5 << 20) + 512)]
    t.stop(ok=True)
    t.stop(ok=True)
    assert [c[3:] for c in run.calls] == [
        ["tracking_start"], *[["tracking_get_next"]] * 4, ["tracking_stop"],
    ]  # fmt: skip
    assert t.check(True).state == "unknown"
    assert t.repair(True) is None


@pytest.mark.parametrize("answer", ["six", "-1", "6", "99999999999999999999"])
def test_dm_does_not_believe_a_wrong_answer(dm_source: Source, answer: str) -> None:
    t = DmTracker(dm_source, run=Target([answer]))
    t.start()
    with pytest.raises(DeviceControlError):
        t.take()


def test_dm_stop_after_a_failure_never_raises(dm_source: Source) -> None:
    def run(args: list[str]) -> str:
        if args[-1] == "tracking_stop":
            raise DeviceControlError("gone")
        return ""

    t = DmTracker(dm_source, run=run)
    t.start()
    t.stop(ok=False)
    t.start()
    with pytest.raises(DeviceControlError):
        t.stop(ok=True)


def test_dm_knows_the_targets_that_track(dm_source: Source) -> None:
    assert has_tracking(dm_source, lambda args: "0 100 ploop 11 @4\n")
    assert has_tracking(dm_source, lambda args: "0 100 qcow2 4\n")
    assert not has_tracking(dm_source, lambda args: "0 100 linear 8:0 0\n")


def test_extents_count_their_bytes() -> None:
    assert Extents.of([(0, 5), (7, 9)]).bytes == 7


@pytest.mark.parametrize("renderer", ["text", "json"])
def test_a_line_of_the_log_is_written_at_once_so_that_threads_do_not_mix_theirs(
    renderer: str,
) -> None:
    class Writes(io.StringIO):
        def write(self, text: str) -> int:
            seen.append(text)
            return len(text)

    seen: list[str] = []
    out = Writes()
    one = TextRenderer(9, out, out) if renderer == "text" else JsonRenderer(out)
    one.error(1.0, "what went wrong", None)
    assert len(seen) == 1 and seen[0].endswith("\n")


def test_the_idle_share_is_that_of_a_second_or_more(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = [(0, 0)]
    monkeypatch.setattr(cpu, "_ticks", lambda: ticks[0])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    second = 2 * os.sysconf("SC_CLK_TCK")
    share = cpu.IdleShare()
    assert share.recent() == 1.0, "not known yet"
    ticks[0] = (second // 4, second // 2)
    assert share.recent() == 1.0
    ticks[0] = (second // 4, second)
    assert share.recent() == 0.25
    ticks[0] = (second // 4 + 10, second + 10)
    assert share.recent() == 0.25, "until there is another second"


def test_the_ticks_of_this_machine_grow() -> None:
    idle, total = cpu._ticks()
    assert 0 < idle < total
