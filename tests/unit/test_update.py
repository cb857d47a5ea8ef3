# SPDX-License-Identifier: Apache-2.0
"""What a target has already is not sent again: an older copy (--update), and what a copy that
failed has left (NAME.pyploop-partial)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakehost import fake_host
from support import (
    d1_end,
    d1_frame,
    d1_sync,
    loop_device,
    mounted,
    needs,
    pyploop_cmd,
    pyploop_env,
    wait_until,
)
from support import run as run_command

import pyploop
from pyploop import Copy, CopyOptions, _core
from pyploop.diskcopy import prior
from pyploop.diskcopy.receiver import receive
from pyploop.diskcopy.sinks import Wanted, open_sink
from pyploop.diskcopy.target_update import InPlaceSink, UpdateSink
from pyploop.errors import ConnectError, CreateError, ParameterError, ProtocolError
from pyploop.report.events import Reporter
from pyploop.system import kernel
from pyploop.units import BLOCK, KIB, MIB
from pyploop.wire import d1

SIZE = 10 * MIB + 300
UPDATE = CopyOptions(update=True, proof="always")
IN_PLACE = CopyOptions(update=True, inplace=True, proof="always")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return fake_host(tmp_path, monkeypatch)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Data, a hole of 2 MiB, data, and zeroes that are no hole."""
    made = tmp_path / "source"
    with made.open("wb") as f:
        f.write(os.urandom(4 * MIB))
        f.seek(6 * MIB)
        f.write(os.urandom(3 * MIB) + bytes(MIB) + os.urandom(300))
    assert made.stat().st_size == SIZE
    return made


def older(source: Path, target: Path, *, blocks: int = 20, seed: int = 1) -> int:
    """Make the target an older state of the source; returns the bytes that differ, the last
    block included, which is sent in any case."""
    state = bytearray(source.read_bytes())
    data = [*range(4 * MIB // BLOCK), *range(6 * MIB // BLOCK, 9 * MIB // BLOCK)]
    for block in random.Random(seed).sample(data, blocks):
        state[block * BLOCK + 77] ^= 1
    target.write_bytes(state)
    return blocks * BLOCK + SIZE % BLOCK


def same(source: Path, target: Path) -> bool:
    return source.read_bytes() == target.read_bytes()


def beside(target: Path) -> set[str]:
    """What else has the target's name in its."""
    return {p.name for p in target.parent.iterdir() if target.name in p.name} - {target.name}


# ---- an older copy on this host


@pytest.mark.parametrize("keep_partial", [True, False])
def test_only_blocks_that_differ_are_written_and_the_new_file_takes_the_name(
    source: Path, tmp_path: Path, keep_partial: bool
) -> None:
    target = tmp_path / "target"
    differ = older(source, target)
    target.chmod(0o640)
    before = target.read_bytes()
    with target.open("rb") as old:
        options = CopyOptions(update=True, keep_partial=keep_partial, proof="always")
        done = pyploop.copy(source, target, options=options)
        assert old.read() == before, "the older copy is not written to"
        assert os.fstat(old.fileno()).st_ino != target.stat().st_ino
    assert same(source, target)
    assert done.data_bytes == differ
    assert done.reused_bytes == 7 * MIB - 20 * BLOCK
    assert target.stat().st_mode & 0o777 == 0o640
    assert not beside(target)


def test_in_place_the_older_copy_itself_is_written_to(source: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    differ = older(source, target)
    link.hardlink_to(target)
    done = pyploop.copy(source, target, options=IN_PLACE)
    assert done.data_bytes == differ
    assert same(source, link) and not beside(target)


@pytest.mark.parametrize("options", [UPDATE, IN_PLACE], ids=["new", "inplace"])
@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"x",
        b"y" * (5 * MIB + 13),
        bytes(SIZE),
        b"z" * (SIZE + 3 * MIB + 1),
        "other",
        "holes",
    ],
    ids=["empty", "a byte", "shorter", "zeroes", "longer", "other", "holes"],
)
def test_whatever_the_target_has_it_becomes_the_source(
    source: Path, tmp_path: Path, options: CopyOptions, state: bytes | str
) -> None:
    target = tmp_path / "target"
    if state == "other":
        target.write_bytes(os.urandom(SIZE))
    elif state == "holes":
        with target.open("wb") as f:
            f.seek(5 * MIB - 5)
            f.write(os.urandom(2 * MIB))
            f.truncate(SIZE + 1)
    else:
        assert isinstance(state, bytes)
        target.write_bytes(state)
    done = pyploop.copy(source, target, options=options)
    assert same(source, target) and not beside(target)
    assert done.root == pyploop.verify(source, target).root


def test_the_receipt_of_an_update_is_one_of_all_that_the_target_has(
    source: Path, tmp_path: Path
) -> None:
    target, receipt = tmp_path / "target", tmp_path / "receipt"
    older(source, target)
    pyploop.copy(source, target, options=CopyOptions(update=True, receipt=receipt))
    assert pyploop.verify(target, receipt).same


def test_without_a_target_to_update_it_is_a_new_file(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    done = pyploop.copy(source, target, options=UPDATE)
    assert same(source, target)
    assert done.reused_bytes == 0


def test_an_update_that_fails_leaves_the_older_copy_and_nothing_else(
    source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    older(source, target)
    before = target.read_bytes()
    with Copy(source, target, options=UPDATE) as copying:
        copying.first_pass()
    assert target.read_bytes() == before and not beside(target)


def test_a_target_that_was_replaced_meanwhile_is_not_replaced_again(
    source: Path, tmp_path: Path
) -> None:
    target, other = tmp_path / "target", tmp_path / "other"
    older(source, target)
    why = pytest.raises(CreateError, match=r"cannot be named .*: it was replaced meanwhile")
    with why, Copy(source, target, options=UPDATE) as copying:
        copying.first_pass()
        other.write_bytes(b"mine")
        other.replace(target)
        copying.freeze_and_finish()
    assert target.read_bytes() == b"mine"
    (kept,) = beside(target)
    assert kept.startswith("target.complete-")
    assert same(source, tmp_path / kept)


def test_a_target_that_was_replaced_during_its_update_in_place_is_a_failure(
    source: Path, tmp_path: Path
) -> None:
    target, other = tmp_path / "target", tmp_path / "other"
    older(source, target)
    why = pytest.raises(CreateError, match="was moved or replaced while it was updated")
    with why, Copy(source, target, options=IN_PLACE) as copying:
        copying.first_pass()
        other.write_bytes(b"mine")
        other.replace(target)
        copying.freeze_and_finish()
    assert target.read_bytes() == b"mine"


@pytest.mark.root
@pytest.mark.parametrize("flag", ["i", "a"])
def test_a_target_that_cannot_be_replaced_is_refused_before_the_first_byte(
    source: Path, tmp_path: Path, flag: str
) -> None:
    needs("root")
    target = tmp_path / "target"
    older(source, target)
    if subprocess.run(["chattr", f"+{flag}", target], check=False).returncode:
        pytest.skip(f"the file system of {tmp_path} has no such attributes")
    try:
        with pytest.raises(CreateError, match="it may not be changed"):
            pyploop.copy(source, target, options=UPDATE)
    finally:
        run_command("chattr", f"-{flag}", target)
    assert not beside(target)


def test_the_source_itself_is_no_target_to_update(source: Path) -> None:
    before = source.read_bytes()
    for options in (UPDATE, IN_PLACE):
        with pytest.raises(ParameterError, match="source"):
            pyploop.copy(source, source, options=options)
    assert source.read_bytes() == before and not beside(source)


def test_what_is_no_file_is_not_updated(source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(source)
    os.mkfifo(tmp_path / "fifo")
    for options in (UPDATE, IN_PLACE):
        for name, what in (("folder", "folder"), ("link", "symbolic link"), ("fifo", "named pipe")):
            with pytest.raises(CreateError, match=f"cannot update .*{name}: it is a {what}"):
                pyploop.copy(source, tmp_path / name, options=options)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-s", "a", "--update"], "--update needs both SOURCE and TARGET"),
        (["-d", "a", "--update"], "--update needs both SOURCE and TARGET"),
        (["-d", "a", "--keep-partial"], "--keep-partial needs both SOURCE and TARGET"),
        (["a", "b", "--inplace"], "says how to update a target"),
        (["a", "b", "--update", "--to-device"], "only in place"),
        (["a", "b", "--update", "--write", "direct"], "through the page cache"),
        (["a", "b:c", "--inplace"], "says how to update a target"),
    ],
)
def test_options_of_an_update_that_do_not_go_together_are_refused(
    words: list[str], why: str, tmp_path: Path
) -> None:
    command = [*pyploop_cmd(), "copy", *words]
    done = subprocess.run(
        command, env=pyploop_env(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, why in done.stderr) == (38, True), done.stderr


@pytest.mark.root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_file_system_with_reflinks_takes_no_room_for_what_is_the_same(
    tmp_path: Path, source: Path, kind: str
) -> None:
    needs("root", "loop", f"mkfs.{kind}")
    disk = tmp_path / "disk"
    with disk.open("wb") as f:
        f.truncate(320 * MIB)
    run_command(f"mkfs.{kind}", "-q", disk)
    with loop_device(disk) as device, mounted(device, tmp_path / "mnt") as point:
        target = point / "target"
        differ = older(source, target, blocks=4)
        before = target.read_bytes()
        with target.open("rb") as old:
            os.sync()
            free = os.statvfs(point)
            done = pyploop.copy(source, target, options=UPDATE)
            os.sync()
            taken = (free.f_bfree - os.statvfs(point).f_bfree) * free.f_bsize
            assert old.read() == before
        assert done.data_bytes == differ
        assert same(source, target) and not beside(target)
        assert taken < 2 * MIB, "the older one has all of it still"


@pytest.mark.root
def test_a_device_is_updated_in_place_and_what_lies_behind_it_stays(
    tmp_path: Path, source: Path
) -> None:
    needs("root", "loop")
    disk = tmp_path / "disk"
    differ = older(source, disk)
    whole = -(-(SIZE + MIB) // MIB) * MIB
    with disk.open("r+b") as f:
        f.seek(SIZE)
        f.write(b"\xa5" * (whole - SIZE))
    with loop_device(disk) as device:
        options = CopyOptions(update=True, inplace=True, to_device=True, proof="always")
        done = pyploop.copy(source, device, options=options)
    assert done.data_bytes == differ
    assert disk.read_bytes() == source.read_bytes() + b"\xa5" * (whole - SIZE)


@pytest.mark.root
def test_a_file_that_a_loop_device_shows_is_not_updated_in_place(
    tmp_path: Path, source: Path
) -> None:
    needs("root", "loop")
    target = tmp_path / "target"
    older(source, target)
    before = target.read_bytes()
    with loop_device(target), pytest.raises(CreateError, match="in place: /dev/loop"):
        pyploop.copy(source, target, options=IN_PLACE)
    assert target.read_bytes() == before


# ---- what a copy that failed has left


PARTIAL = CopyOptions(keep_partial=True, proof="always")


def test_a_failed_copy_leaves_a_partial_file_and_the_next_one_goes_on_from_it(
    source: Path, tmp_path: Path
) -> None:
    target, partial = tmp_path / "target", tmp_path / "target.pyploop-partial"
    with Copy(source, target, options=PARTIAL) as copying:
        copying.first_pass()
    assert not target.exists()
    assert partial.stat().st_mode & 0o777 == 0o600
    with source.open("r+b") as f:
        f.seek(3 * MIB)
        f.write(os.urandom(BLOCK))
    notes: list[str] = []
    done = pyploop.copy(
        source,
        target,
        options=PARTIAL,
        on_event=lambda e: notes.append(getattr(e, "text", "")),
    )
    assert done.data_bytes == BLOCK + SIZE % BLOCK
    assert same(source, target) and not beside(target)
    assert any("Going on from" in text for text in notes)


def test_a_partial_file_of_another_source_does_no_harm(source: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "target", tmp_path / "target.pyploop-partial"
    partial.write_bytes(os.urandom(SIZE + MIB))
    pyploop.copy(source, target, options=PARTIAL)
    assert same(source, target) and not beside(target)


@pytest.mark.parametrize("options", [PARTIAL, replace(PARTIAL, update=True)])
def test_the_partial_file_of_another_copy_does_not_get_the_name(
    source: Path, tmp_path: Path, options: CopyOptions
) -> None:
    """Somebody has removed ours, and another copy to the same name has begun."""
    target, partial = tmp_path / "target", tmp_path / "target.pyploop-partial"
    if options.update:
        target.write_bytes(b"older")
    why = pytest.raises(CreateError, match=r"cannot be named .*removed, moved or replaced")
    with why, Copy(source, target, options=options) as copying:
        copying.first_pass()
        partial.unlink()
        partial.write_bytes(b"of another copy")
        copying.freeze_and_finish()
    assert partial.read_bytes() == b"of another copy"
    assert target.read_bytes() == b"older" if options.update else not target.exists()
    assert beside(target) == {partial.name}


def test_a_file_of_holes_at_the_partial_name_stays_when_the_copy_is_refused(
    tmp_path: Path,
) -> None:
    source = tmp_path / "target.pyploop-partial"
    with source.open("wb") as f:
        f.truncate(MIB)
    with pytest.raises(ParameterError, match="destroy the source"):
        pyploop.copy(source, tmp_path / "target", options=PARTIAL)
    assert source.stat().st_size == MIB


def test_the_message_of_the_failure_names_the_partial_file(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    options = CopyOptions(keep_partial=True, before_thaw="false")
    with pytest.raises(pyploop.CommandError):
        pyploop.copy(source, target, options=options)
    assert same(source, target), "it was durable by then"
    target.unlink()
    with (
        pytest.raises(CreateError, match=r"target\.pyploop-partial keeps [\d.]+ MiB, and the same"),
        Copy(source, target, options=PARTIAL) as copying,
    ):
        copying.first_pass()
        raise CreateError("something else")


def test_an_update_that_fails_goes_on_from_its_partial_file_and_from_the_older_copy(
    source: Path, tmp_path: Path
) -> None:
    """The partial file has only a part of what the older copy has."""
    target, partial = tmp_path / "target", tmp_path / "target.pyploop-partial"
    differ = older(source, target)
    with partial.open("wb") as f:
        f.write(source.read_bytes()[: 2 * MIB])
        f.seek(7 * MIB)
        f.write(b"junk" * KIB)
    options = CopyOptions(update=True, keep_partial=True, proof="always")
    done = pyploop.copy(source, target, options=options)
    assert same(source, target) and not beside(target)
    assert done.data_bytes <= differ + BLOCK


def test_two_copies_do_not_share_a_partial_file(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    why = pytest.raises(CreateError, match=r"another copy writes .*partial just now")
    with Copy(source, target, options=PARTIAL), why:
        pyploop.copy(source, target, options=PARTIAL)
    assert not beside(target), "nothing was in it"


def test_a_partial_file_that_is_something_else_is_not_touched(source: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "target", tmp_path / "target.pyploop-partial"
    partial.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CreateError):
        pyploop.copy(source, target, options=PARTIAL)
    partial.unlink()
    partial.write_bytes(b"x")
    (tmp_path / "link").hardlink_to(partial)
    with pytest.raises(CreateError, match="no unfinished copy"):
        pyploop.copy(source, target, options=PARTIAL)
    assert partial.read_bytes() == b"x" and not (tmp_path / "elsewhere").exists()
    pyploop.copy(source, target, options=CopyOptions(keep_partial=False))
    assert same(source, target) and partial.read_bytes() == b"x"


def test_a_name_without_room_for_a_longer_one_has_no_partial_file(
    source: Path, tmp_path: Path
) -> None:
    target = tmp_path / ("n" * 250)
    with Copy(source, target, options=PARTIAL) as copying:
        copying.first_pass()
    assert not target.exists() and not beside(target)
    pyploop.copy(source, target, options=PARTIAL)
    assert same(source, target)


# ---- from and to another host


@pytest.mark.parametrize("way", ["push", "pull"])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_older_copy_on_the_other_side_is_brought_up_to_date(
    host: Path, source: Path, tmp_path: Path, way: str, inplace: bool
) -> None:
    source, target, words = places(host, source, tmp_path, way)
    differ = older(source, target)
    done = pyploop.copy(*words, options=CopyOptions(update=True, inplace=inplace))
    assert same(source, target) and not beside(target)
    assert done.data_bytes == differ and done.proven
    assert done.wire_bytes < differ + 20_000


def places(host: Path, source: Path, folder: Path, way: str) -> tuple[Path, Path, tuple[str, str]]:
    """(source, target, the two as words)."""
    if way == "push":
        return source, host / "target", (str(source), "b:target")
    return source.rename(host / "disk"), folder / "target", ("b:disk", str(folder / "target"))


@pytest.mark.parametrize(
    ("way", "victim"), [("push", "agent"), ("push", "copy"), ("pull", "agent"), ("pull", "copy")]
)
def test_after_a_kill_the_next_copy_goes_on_from_what_has_arrived(
    host: Path, source: Path, tmp_path: Path, way: str, victim: str
) -> None:
    source, target, words = places(host, source, tmp_path, way)
    partial = target.with_name("target.pyploop-partial")
    arrived = 2 * MIB // 512

    def has_arrived() -> bool:
        return partial.exists() and partial.stat().st_blocks > arrived

    with copying(*words, "--bwlimit", "4M") as process:
        wait_until(has_arrived, "data")
        kill(process, victim)
    assert not target.exists() and partial.stat().st_blocks > arrived
    done = pyploop.copy(*words)
    assert same(source, target) and not beside(target)
    assert done.reused_bytes > MIB and done.data_bytes < 6 * MIB


@pytest.mark.parametrize("number", range(int(os.environ.get("PYPLOOP_KILLS", "2"))))
def test_a_kill_at_any_moment_and_a_resume_give_the_whole_image(
    host: Path, source: Path, tmp_path: Path, number: int
) -> None:
    chosen = random.Random(number)
    source, target, words = places(host, source, tmp_path, ("push", "pull")[number % 2])
    update = number % 3 == 0
    if update:
        older(source, target, blocks=1500)
        before = target.read_bytes()
    option = ("--update",) * update
    with copying(*words, *option, "--bwlimit", "8M") as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chosen.uniform(0.2, 2.5))
        kill(process, chosen.choice(("agent", "copy")))
    if update:
        assert same(source, target) or target.read_bytes() == before
    if update or not target.exists():
        pyploop.copy(*words, options=CopyOptions(update=update))
    assert same(source, target) and not beside(target)


@contextlib.contextmanager
def copying(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A copy that runs in the body, and has ended at both ends after it."""
    command = [*pyploop_cmd(), "copy", *words, "--compress", "never", "--retry", "0"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    agents = set[int]()
    try:
        wait_until(lambda: agent_of(process.pid) or process.poll() is not None, "the agent")
        agents.add(agent_of(process.pid))
        yield process
        process.wait(60)
        wait_until(lambda: not any(map(runs, agents - {0})), "the agent ends")
    finally:
        process.kill()
        process.wait()


def kill(process: subprocess.Popen[bytes], victim: str) -> None:
    pid = process.pid if victim == "copy" else agent_of(process.pid)
    if pid and process.poll() is None:
        os.kill(pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def agent_of(pid: int) -> int:
    """The agent that this process has started; a script stands for its ssh."""
    with contextlib.suppress(OSError):  # they come and go
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                if b"copy-agent" in words and b"pyploop.cli.main" in words:
                    return child
                if found := agent_of(child):
                    return found
    return 0


def test_a_copy_from_another_host_without_a_partial_file_leaves_nothing(
    host: Path, tmp_path: Path
) -> None:
    options = CopyOptions(keep_partial=False, before_thaw="kill -9 $PPID")
    (host / "disk").write_bytes(os.urandom(MIB))
    with pytest.raises((ConnectError, pyploop.PyploopError)):
        pyploop.copy("b:nothing", str(tmp_path / "target"), options=options)
    assert not beside(tmp_path / "target")


# ---- the protocol


@pytest.fixture
def stream() -> Iterator[tuple[int, int]]:
    """A pipe, of a sender that offers no digests."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_sender_that_does_not_compare_is_refused(
    tmp_path: Path, stream: tuple[int, int], inplace: bool
) -> None:
    """It would leave out zeroes, as for a new file."""
    target = tmp_path / "target"
    target.write_bytes(b"old" * 10_000)
    sink = open_sink(str(target), Reporter(), Wanted(update=True, inplace=inplace))
    os.write(stream[1], d1_frame(0, b"new" * 1000) + d1_sync() + d1_end())
    with pytest.raises(ProtocolError, match="does not compare what it sends"):
        receive(str(target), stream[0], None, Reporter(), sink=sink)
    assert not beside(target)
    if not inplace:
        assert target.read_bytes() == b"old" * 10_000


def cell(pos: int, blocks: int, digests: int, data: bytes = b"") -> bytes:
    return d1.CELL_HEAD.pack(pos, blocks, digests) + data


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (cell(4 * MIB, 8, 0, b"\0") + cell(0, 8, 0, b"\0"), "out of order"),
        (cell(0, 8, 9), "too many"),
        (cell(0, 1025, 9), "too many"),
        (cell(0, 8, 2, b"\1" + bytes(32)), "not well-formed"),
        (cell(8 * MIB, 8, 1, b"\1" + bytes(16)), "not well-formed"),
        (cell(BLOCK, 8, 1, b"\1" + bytes(16)), "not well-formed"),
    ],
)
def test_digests_of_a_hostile_receiver_are_refused(told: bytes, why: str) -> None:
    rfd, wfd = os.pipe()
    try:
        os.write(wfd, told)
        contents = prior.of_peer(rfd, -1, prior.new_key(), 5.0, lambda: float("inf"))
        contents.begin(8 * MIB)
        with pytest.raises(ProtocolError, match=why):
            list(contents.parts(_core.Known(8 * MIB)))
    finally:
        os.close(rfd)
        os.close(wfd)


def test_all_parts_come_in_order_with_what_was_told_of_them(tmp_path: Path) -> None:
    """Also where the target has more than is asked for at a time."""
    size = 90 * MIB
    path = tmp_path / "target"
    with path.open("wb") as f:
        for start in (0, 30, 31, 50, 89):
            f.seek(start * MIB)
            f.write(os.urandom(MIB))
        f.seek(60 * MIB)
        f.write(os.urandom(20 * MIB))
    with open_sink(str(path), Reporter(), Wanted(update=True, inplace=True)) as sink:
        contents = prior.of_file(sink, size)
        contents.begin(size)
        parts = list(contents.parts(_core.Known(size)))
    assert [a for a, _ in parts[1:]] == [b for _, b in parts[:-1]]
    assert parts[0][0] == 0 and parts[-1][1] == size and len(parts) > 1
    assert contents.bytes == 25 * MIB


def test_a_sender_that_stops_reading_digests_does_not_keep_the_receiver(tmp_path: Path) -> None:
    path = tmp_path / "target"
    path.write_bytes(os.urandom(40 * MIB))
    rfd, wfd = os.pipe()
    failed = threading.Event()
    try:
        with open_sink(str(path), Reporter(), Wanted(update=True, inplace=True)) as sink:
            teller = prior.Teller(sink, 40 * MIB, prior.new_key(), None)
            telling = prior.Telling(teller, wfd, failed.set)
            telling.end()
            assert failed.is_set() and telling.failure is not None
    finally:
        os.close(rfd)
        os.close(wfd)


def test_sinks_are_chosen_by_what_is_wanted_and_there(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"x")
    found: list[tuple[str, Wanted, type[Any], bool]] = [
        (str(there), Wanted(update=True), UpdateSink, True),
        (str(there), Wanted(update=True, inplace=True), InPlaceSink, True),
        (str(tmp_path / "new"), Wanted(partial=True), UpdateSink, False),
        (str(tmp_path / "new"), Wanted(update=True, partial=True), UpdateSink, False),
    ]
    for name, wanted, kind, has in found:
        with open_sink(name, Reporter(), wanted) as sink:
            assert type(sink) is kind and sink.has_prior is has
    with pytest.raises(CreateError, match="File exists"):
        open_sink(str(there), Reporter(), Wanted(partial=True))
    assert not beside(tmp_path / "new") and not beside(there)


def test_clone_says_when_a_file_system_cannot_share_blocks() -> None:
    a, b = os.memfd_create("a"), os.memfd_create("b")
    try:
        with pytest.raises(OSError):
            kernel.clone(a, b, "a")
    finally:
        os.close(a)
        os.close(b)
