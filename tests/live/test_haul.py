# SPDX-License-Identifier: Apache-2.0
"""p.haul's way of moving disks (tests/live/haul.py): two processes, two disks
with writers in them, sockets given as descriptors, `import libploop`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import d2_peer
import fakeploop
import pytest
from support import MIB, is_frozen, loop_device, needs, pyploop_env, run, wait_until
from support_live import Fio, end, file_system, fio, same, sparse_file, work_dir

from pyploop import libploop

pytestmark = pytest.mark.root

SIZE = 48 * MIB
# Not as fast as it can: each step waits for what the disk has to write back.
WRITES = ["--rw=randwrite", "--bsrange=4k-64k", "--fsync=16", "--ioengine=psync", "--rate=12m"]
REASON_SECONDS = 20.0
HAUL = Path(__file__).with_name("haul.py")
GUID = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
DESCRIPTOR = f"""<?xml version="1.0"?>
<Parallels_disk_image>
  <Disk_Parameters><Disk_size>{SIZE // 512}</Disk_size></Disk_Parameters>
  <StorageData><Storage>
    <Start>0</Start><End>{SIZE // 512}</End><Blocksize>2048</Blocksize>
    <Image><GUID>{GUID}</GUID><Type>Plain</Type><File>root.hds</File></Image>
  </Storage></StorageData>
  <Snapshots/>
</Parallels_disk_image>
"""


class Disk:
    """One disk of the source, mounted, and where its copy goes."""

    def __init__(self, folder: Path, name: str, stack: contextlib.ExitStack) -> None:
        home = folder / name
        home.mkdir()
        self.image = sparse_file(home / "root.hds", SIZE)
        self.ddxml = home / "DiskDescriptor.xml"
        self.ddxml.write_text(DESCRIPTOR)
        device = stack.enter_context(loop_device(self.image))
        self.point = stack.enter_context(file_system(device, home / "mnt"))
        self.target = folder / f"{name}.copy"

    def write(self, stack: contextlib.ExitStack) -> Fio:
        return stack.enter_context(fio(self.point, "w", *WRITES, f"--size={SIZE // 4}"))


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    needs("loop", "fio", "mkfs.ext4")
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def folder(stack: contextlib.ExitStack) -> Path:
    return stack.enter_context(work_dir())


@pytest.fixture
def disks(stack: contextlib.ExitStack, folder: Path) -> list[Disk]:
    return [Disk(folder, name, stack) for name in ("a", "b")]


@pytest.fixture
def alias(folder: Path) -> str:
    """The folder in which `import libploop` finds ours."""
    made = run(sys.executable, "-m", "pyploop.libploop", "--alias", folder, env=pyploop_env())
    assert Path(made.strip()) == folder / "libploop.py"
    return str(folder)


def connected(tcp: bool) -> tuple[socket.socket, socket.socket]:
    if not tcp:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        return a, server.accept()[0]


class Process:
    """One end."""

    def __init__(self, alias: str, words: list[object], fds: list[int], **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HAUL), *map(str, words)],
            pass_fds=fds,
            env=pyploop_env({"PYTHONPATH": alias, **env}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._seen = b""

    def say(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, seconds: float = 60) -> dict[str, Any]:
        """The next line it says."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._seen:
            left = deadline - time.monotonic()
            assert left > 0, f"nothing was said within {seconds} s"
            if select.select([self.process.stdout], [], [], left)[0]:
                part = os.read(self.process.stdout.fileno(), 65536)
                assert part, "it has ended"
                self._seen += part
        line, _, self._seen = self._seen.partition(b"\n")
        result: dict[str, Any] = json.loads(line)
        return result

    def do(self, command: str) -> int:
        self.say(command)
        got = self.answer()
        assert "error" not in got, got
        return int(got["sent"])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        end(self.process)


@contextlib.contextmanager
def haul(
    disks: list[Disk], alias: str, tcp: bool = True, **env: str
) -> Iterator[tuple[Process, Process]]:
    """Both processes, which alone hold the sockets."""
    source: list[object] = ["source"]
    target: list[object] = ["target"]
    with contextlib.ExitStack() as processes:
        with contextlib.ExitStack() as ours:
            pairs = [tuple(map(ours.enter_context, connected(tcp))) for _ in disks]
            for disk, (a, b) in zip(disks, pairs, strict=True):
                source += [disk.ddxml, a.fileno()]
                target += [disk.target, b.fileno(), disk.image]
            receiver = Process(alias, target, [b.fileno() for _, b in pairs], **env)
            processes.callback(receiver.close)
            sender = Process(alias, source, [a.fileno() for a, _ in pairs])
            processes.callback(sender.close)
        yield sender, receiver


def copied(disks: list[Disk], receiver: Process) -> None:
    """Both images are what the frozen disks were."""
    ended = [receiver.answer() for _ in disks]
    assert not [e for e in ended if "error" in e], ended
    for disk in disks:
        assert same(disk.target.with_name(disk.target.name + ".truth"), disk.target, SIZE)
        assert not is_frozen(disk.point)


@pytest.mark.parametrize("tcp", [True, False])
def test_two_live_disks_arrive_as_they_were_when_frozen(
    stack: contextlib.ExitStack, disks: list[Disk], alias: str, tcp: bool
) -> None:
    writers = [disk.write(stack) for disk in disks]
    with haul(disks, alias, tcp, HAUL_TRUTH="1") as (sender, receiver):
        assert sender.do("start") > 0
        sender.do("next")
        assert sender.do("next") > 0, "the writers write"
        sender.do("stop")
        copied(disks, receiver)
        assert all(w.running for w in writers), "they wrote all the time"


def test_disks_are_copied_at_once_by_threads(
    stack: contextlib.ExitStack, disks: list[Disk], alias: str
) -> None:
    for disk in disks:
        disk.write(stack)
    with haul(disks, alias, HAUL_TRUTH="1") as (sender, receiver):
        assert sender.do("threads") > 0
        copied(disks, receiver)


def gone(disks: list[Disk]) -> None:
    """The failed copy has left nothing, and nothing is frozen."""
    for disk in disks:
        wait_until(lambda d=disk: not _frozen(d), "it is thawed", REASON_SECONDS)  # type: ignore[misc]
        assert not disk.target.exists()


def _frozen(disk: Disk) -> bool:
    probes: list[subprocess.Popen[bytes]] = []
    waits = writes_wait(disk, probes)
    probes[0].wait(REASON_SECONDS)
    return waits


def writes_wait(disk: Disk, probes: list[subprocess.Popen[bytes]]) -> bool:
    """A write does not end.  Not by is_frozen, which would get in the way."""
    probes.append(subprocess.Popen(["touch", str(disk.point / "probe")]))
    with contextlib.suppress(subprocess.TimeoutExpired):
        probes[-1].wait(0.5)
    return probes[-1].poll() is None


def test_a_killed_receiver_is_reported(
    stack: contextlib.ExitStack, disks: list[Disk], alias: str
) -> None:
    for disk in disks:
        disk.write(stack)
    with haul(disks, alias) as (sender, receiver):
        sender.do("start")
        receiver.kill()
        sender.say("next")
        reason = sender.answer(REASON_SECONDS)["error"]
        assert "receiver" in reason or "peer" in reason, reason
        # It is over: the next step says so too, and does not hang.
        sender.say("stop")
        assert "over" in sender.answer(REASON_SECONDS)["error"]
        gone(disks)


def test_a_receiver_killed_while_the_source_is_frozen_thaws_it(
    stack: contextlib.ExitStack, disks: list[Disk], alias: str, folder: Path
) -> None:
    for disk in disks:
        disk.write(stack)
    hold = folder / "hold"
    with haul(disks, alias, HAUL_HOLD=str(hold)) as (sender, receiver):
        sender.do("start")
        sender.say("stop")
        wait_until(hold.exists, "END has come")
        probes: list[subprocess.Popen[bytes]] = []
        assert writes_wait(disks[0], probes), "copy_stop freezes the file system"
        receiver.kill()
        reason = sender.answer(REASON_SECONDS)["error"]
        assert "receiver" in reason or "peer" in reason, reason
        for probe in probes:
            assert probe.wait(REASON_SECONDS) == 0
        # The first disk's copy was complete and had its name; only the word was lost.
        disks[0].target.unlink()
        gone(disks)


def test_a_killed_sender_is_reported(
    stack: contextlib.ExitStack, disks: list[Disk], alias: str
) -> None:
    for disk in disks:
        disk.write(stack)
    with haul(disks, alias) as (sender, receiver):
        sender.do("start")
        sender.kill()
        reasons = [receiver.answer(REASON_SECONDS)["error"] for _ in disks]
        assert all("without END" in r for r in reasons), reasons
        gone(disks)


def test_a_sender_killed_while_frozen_is_thawed_and_reported(
    stack: contextlib.ExitStack, disks: list[Disk], alias: str, folder: Path
) -> None:
    for disk in disks:
        disk.write(stack)
    hold = folder / "hold"
    # Not by TCP: there the first write to a dead peer succeeds.
    with haul(disks, alias, tcp=False, HAUL_HOLD=str(hold)) as (sender, receiver):
        sender.do("start")
        sender.say("stop")
        wait_until(hold.exists, "END has come")
        probes: list[subprocess.Popen[bytes]] = []
        assert writes_wait(disks[0], probes), "copy_stop freezes the file system"
        sender.kill()
        # The second disk's receiver waits for no answer of the first.
        assert "without END" in receiver.answer(REASON_SECONDS)["error"]
        for probe in probes:
            assert probe.wait(REASON_SECONDS) == 0
        hold.unlink()
        assert "cannot answer the sender" in receiver.answer(REASON_SECONDS)["error"]
        disks[0].target.unlink()
        gone(disks)


# ---- one disk, a peer that is watched


@pytest.fixture
def disk(stack: contextlib.ExitStack, folder: Path) -> Disk:
    return Disk(folder, "a", stack)


@pytest.mark.parametrize("answer", [d2_peer.OLD, d2_peer.NEW])
def test_the_file_system_is_frozen_in_copy_stop(disk: Disk, answer: int) -> None:
    """The C library never freezes: a condition tests the wrong variable."""
    seen: list[bool] = []
    a, b = socket.socketpair()
    with a, b:
        model = d2_peer.Receiver(b, answer, on_end=lambda: seen.append(is_frozen(disk.point)))
        copy = libploop.ploopcopy(str(disk.ddxml), a.fileno())
        copy.copy_start()
        copy.copy_next_iteration()
        assert not is_frozen(disk.point)
        (disk.point / "file").write_bytes(os.urandom(MIB))
        assert copy.copy_stop() >= MIB
        model.join()
    assert seen == [True]
    assert not is_frozen(disk.point)


WHOLE_COPY = """
import sys
from pyploop import libploop
libploop.device_of = lambda ddxml: "/dev/ploop0"  # the fake is not in /sys/block's list
copy = libploop.ploopcopy(sys.argv[1], int(sys.argv[2]))
print(copy.copy_start(), copy.copy_next_iteration(), copy.copy_stop())
"""


@pytest.mark.parametrize("answer", [d2_peer.OLD, d2_peer.NEW])
def test_a_ploop1_disk_ends_with_its_header_not_in_use(
    folder: Path, build_cache: Path, answer: int
) -> None:
    """From a made-up /dev/ploop0 (tests/fakeploop)."""
    needs("cc")
    image = folder / "root.hds"
    start = b"WithoutFreeSpace" + bytes(28) + b"Ynot" + os.urandom(4048)
    image.write_bytes(start + os.urandom(2 * MIB - len(start)))
    (folder / "DiskDescriptor.xml").write_text(DESCRIPTOR.replace("Plain", "Compressed"))
    (folder / "mnt").mkdir()
    library = fakeploop.build(build_cache)
    env = fakeploop.env(library, image, folder, fmt="ploop1", mount=folder / "mnt", sleep=False)
    a, b = socket.socketpair()
    with a, b:
        model = d2_peer.Receiver(b, answer)
        words = [sys.executable, "-c", WHOLE_COPY, folder / "DiskDescriptor.xml", a.fileno()]
        done = subprocess.run(
            [str(w) for w in words], env=pyploop_env(env), pass_fds=[a.fileno()],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        model.join()
    header = model.packets[-2]
    assert (header.kind, header.pos, len(header.data)) == (d2_peer.DATA, 0, 4096)
    assert header.data == start[:44] + bytes(4) + start[48:4096]
    assert model.image == header.data + image.read_bytes()[4096:]


def test_a_failing_receiver_ends_copy_stop_and_thaws(disk: Disk) -> None:
    """The C library reads the reply and does not look at it."""
    a, b = socket.socketpair()
    with a, b:
        counted = d2_peer.Receiver(b)
        libploop.ploopcopy(str(disk.ddxml), a.fileno()).copy_start()
        start = len(counted.packets)
    a, b = socket.socketpair()
    with a, b:
        model = d2_peer.Receiver(b)
        copy = libploop.ploopcopy(str(disk.ddxml), a.fileno())
        copy.copy_start()
        (disk.point / "file").write_bytes(os.urandom(MIB))
        model.fail_at = len(model.packets) + 3
        assert model.fail_at > start - 3
        with pytest.raises(RuntimeError, match="cannot write its target"):
            copy.copy_stop()
        model.join()
        assert not is_frozen(disk.point)
        with pytest.raises(RuntimeError, match="over"):
            copy.copy_stop()


def test_a_dropped_copy_ends_its_receiver(disk: Disk) -> None:
    """Nobody closes the socket, and still nobody waits for ever."""
    a, b = socket.socketpair()
    with a, b:
        thread = libploop.ploopcopy_thr_receiver(str(disk.target), b.fileno())
        thread.run = partial(_quietly, thread.run)  # type: ignore[method-assign]
        thread.start()
        copy = libploop.ploopcopy(str(disk.ddxml), a.fileno())
        copy.copy_start()
        del copy
        thread.join(REASON_SECONDS)
        assert not thread.is_alive()
        assert "without END" in str(thread.error)
        assert not disk.target.exists()
        # The descriptors are still the caller's.
        os.fstat(a.fileno())
        os.fstat(b.fileno())


def _quietly(run_thread: Any) -> None:
    with contextlib.suppress(RuntimeError):
        run_thread()


def test_a_regular_file_becomes_the_image(disk: Disk) -> None:
    with disk.target.open("w+b") as f:
        copy = libploop.ploopcopy(str(disk.ddxml), f.fileno())
        copy.copy_start()
        copy.copy_stop()
    run("e2fsck", "-fn", disk.target)
    assert disk.target.stat().st_size == SIZE


def test_a_disk_that_no_device_serves_is_refused_in_words(disk: Disk, folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    (other / "DiskDescriptor.xml").write_text(DESCRIPTOR)
    a, b = socket.socketpair()
    with a, b:
        with pytest.raises(RuntimeError, match="cannot open the delta"):
            libploop.ploopcopy(str(other / "DiskDescriptor.xml"), a.fileno())
        sparse_file(other / "root.hds", SIZE)
        with pytest.raises(RuntimeError, match="no device shows"):
            libploop.ploopcopy(str(other / "DiskDescriptor.xml"), a.fileno())
        (other / "DiskDescriptor.xml").write_text(DESCRIPTOR.replace("Plain", "Compressed"))
        with loop_device(other / "root.hds"), pytest.raises(RuntimeError, match="format ploop1"):
            libploop.ploopcopy(str(other / "DiskDescriptor.xml"), a.fileno())
    r, w = os.pipe()
    with open(r, "rb"), open(w, "wb"), pytest.raises(RuntimeError, match="neither a socket"):
        libploop.ploopcopy(str(disk.ddxml), w)
