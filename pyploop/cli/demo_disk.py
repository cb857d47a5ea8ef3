# SPDX-License-Identifier: Apache-2.0
"""The steps of `pyploop demo`: make a temporary disk, write to it, copy it live through a
pipe, compare source and copy while the source is frozen, and clean up.  An interrupted demo
cleans up, too.

As root the disk is an ext4 on a loop device, tracked by BPF.  Loop devices and freezing need
privileges, so without root it is a plain file, tracked by scanning.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop.errors import CommandError
from pyploop.system import private_folder
from pyploop.units import format_size

TOOL_PATH = ":".join([p for p in [os.environ.get("PATH", "")] if p] + ["/usr/sbin", "/sbin"])
FILL = 0.25
"""Fraction of the disk that has data before the copy."""

_WRITER = """
import os, random, sys
path, size = sys.argv[1], int(sys.argv[2])
fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
if os.fstat(fd).st_size < size:
    os.ftruncate(fd, size)
rng = random.Random(1)
print("writing", flush=True)
n = 0
while True:
    length = rng.choice((4096, 16384, 65536))
    os.pwrite(fd, rng.randbytes(length), rng.randrange((size - length) // 4096) * 4096)
    n += 1
    if n % 16 == 0:
        os.fdatasync(fd)
"""


@dataclass
class Disk:
    """A temporary source.  device: what is copied.  image: what the copy is compared with.
    file: what the writer writes, `file_size` bytes.  what: all this in words."""

    device: str
    image: Path
    file: Path
    file_size: int
    what: str


def _tool(name: str, package: str) -> str:
    found = shutil.which(name, path=TOOL_PATH)
    if found is None:
        raise CommandError(f"the demo needs {name} (Debian package {package})")
    return found


def _run(*args: str) -> str:
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CommandError(f"{' '.join(args)} failed: {reason}")
    return done.stdout.strip()


@contextlib.contextmanager
def loop_disk(folder: Path, size: int) -> Iterator[Disk]:
    """ext4 on a loop device over a sparse image, mounted."""
    image, mount_point = folder / "disk.img", folder / "mnt"
    mkfs, losetup = _tool("mkfs.ext4", "e2fsprogs"), _tool("losetup", "mount")
    mount, umount = _tool("mount", "mount"), _tool("umount", "mount")
    mount_point.mkdir()
    with open(image, "wb") as f:
        f.truncate(size)
    _run(mkfs, "-q", "-F", str(image))
    with contextlib.ExitStack() as undo:
        device = _run(losetup, "--find", "--show", str(image))
        undo.callback(_run, losetup, "--detach", device)
        _run(mount, device, str(mount_point))
        undo.callback(_run, umount, str(mount_point))
        yield Disk(
            device, image, mount_point / "data", int(size * FILL), f"ext4 on {device}, mounted"
        )


@contextlib.contextmanager
def file_disk(folder: Path, size: int) -> Iterator[Disk]:
    """A sparse file, which is copied as it is."""
    image = folder / "disk.img"
    with open(image, "wb") as f:
        f.truncate(size)
    yield Disk(str(image), image, image, int(size * FILL), f"plain file {image}")


@contextlib.contextmanager
def writer(disk: Disk) -> Iterator[int]:
    """Run a process that writes random blocks and syncs now and then.  Yields its PID."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _WRITER, str(disk.file), str(disk.file_size)],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise CommandError("the demo's writer did not start")
        yield process.pid
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def copy_live(disk: Disk, target: Path, events: Path, pid: int) -> tuple[int, int]:
    """Copy the disk as users do: a sender and a receiver, with one pipe for the stream and
    one for the feedback.  Returns the exit codes (sender's, receiver's)."""
    # -P: never import a folder called pyploop that happens to be in the current folder.
    command = [sys.executable, "-P", "-m", "pyploop.cli.main"]
    stream_r, stream_w = os.pipe()
    answer_r, answer_w = os.pipe()
    compare = shlex.join(["cmp", str(disk.image), str(target)])
    sender = [*command, "copy", "-s", disk.device, "-o", str(stream_w), "-f", str(answer_r)]
    sender += ["-F", f"kill -STOP {pid}", "--before-thaw", compare, "--json", str(events)]
    receiver = [*command, "-v-1", "copy", "-d", str(target), "-i", str(stream_r)]
    receiver += ["-f", str(answer_w)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.append(subprocess.Popen(sender, pass_fds=(stream_w, answer_r)))
        processes.append(subprocess.Popen(receiver, pass_fds=(stream_r, answer_w)))
        for fd in (stream_r, stream_w, answer_r, answer_w):
            os.close(fd)
        return processes[0].wait(), processes[1].wait()
    finally:
        for p in processes:
            if p.poll() is None:
                p.terminate()
                p.wait()


def table(summary: dict[str, Any]) -> str:
    """What the demo prints: the steps of the frozen time in milliseconds, and the amounts."""
    steps = dict(summary["frozen"])
    compared = steps.pop("before thaw", 0.0)
    lines = ["", "Frozen time, step by step:"]
    lines += [f"  {name:>20}: {1000 * s:8.2f} ms" for name, s in steps.items()]
    lines.append("  " + "-" * 34)
    lines.append(f"  {'Total':>20}: {1000 * sum(steps.values()):8.2f} ms")
    lines.append(f"  (and {1000 * compared:.0f} ms for the demo's own comparison)")
    lines.append(
        f"\nSent {format_size(summary['data_bytes'])} of a disk of "
        f"{format_size(summary['size'])} in {1 + len(summary['rounds'])} passes, "
        f"{format_size(summary['frozen_bytes'])} of it frozen; tracker {summary['tracker']} "
        f"({summary['completeness']}), {summary['io_mode']}; {summary['dialect']}, "
        f"{summary['acknowledged']}"
    )
    return "\n".join(lines)


def run_demo(size: int, folder: str | None) -> None:
    """Run the whole demo.  CommandError if the copy fails or differs."""
    try:
        _demo(size, folder)
    except OSError as e:
        raise CommandError(f"the demo cannot make its disk: {e}") from e


def _demo(size: int, folder: str | None) -> None:
    root = os.geteuid() == 0
    # Another user could replace such a folder, and root would then write and mount there.
    private_folder.check_way(Path(folder or tempfile.gettempdir()) / "x")
    with contextlib.ExitStack() as undo:
        work = Path(tempfile.mkdtemp(prefix="pyploop-demo-", dir=folder))
        undo.callback(shutil.rmtree, work)
        disk = undo.enter_context((loop_disk if root else file_disk)(work, size))
        if not root:
            print("Not root: no loop device, no freeze; a plain file, tracked by scanning.")
        print(f"Source: {disk.what}, {format_size(size)}", flush=True)
        pid = undo.enter_context(writer(disk))
        target, events = work / "copy.img", work / "events.ndjson"
        codes = copy_live(disk, target, events, pid)
        if codes != (0, 0):
            raise CommandError(f"the copy failed: sender exited {codes[0]}, receiver {codes[1]}")
        summary = json.loads(events.read_text().splitlines()[-1])
        print(table(summary))
        # The sender's --before-thaw has compared them.  The copy fails if they differ.
        print(f"\nSource and copy were compared while the source was frozen: identical{os.linesep}")
