# SPDX-License-Identifier: Apache-2.0
"""What it costs to bring last night's copy on another host up to date.

    python3 bench/bench_update.py                     (as root; 8 GiB of disk)

A sparse image of 16 GiB with 2 GiB of data has changed in 160 MiB, in blocks of 4 KiB that
lie anywhere in its data.  Two hosts in namespaces with an sshd each (tests/lab/hosts.py).  In
turns: both sides' data are read once, at the same time; `pyploop copy --update` of a loop
device on the image, with and without `--inplace`; `rsync --inplace` of the image.  Before each
run the target is the old one again, and nothing of either file is in the page cache.  The
bytes on the wire are those of the network device, both ways.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import GIB, MIB, Sample, cleaned_up, column, in_turns, loop_device, ratio, table
from lab import hosts
from lab.hosts import Host

BLOCK = 4096
STRIDE = 8
"""The data lie in pieces of PIECE, one in so many."""
PIECE = MIB
READ = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
size, pos = os.fstat(fd).st_size, 0
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
buffer = bytearray(1 << 20)
while pos < size:
    try:
        pos = os.lseek(fd, pos, os.SEEK_DATA)
    except OSError:
        break
    end = os.lseek(fd, pos, os.SEEK_HOLE)
    while pos < end:
        pos += os.preadv(fd, [memoryview(buffer)[: end - pos]], pos)
"""


def make(path: Path, size: int, data: int) -> None:
    """A sparse image with random data."""
    generator = random.Random(1)
    with path.open("wb") as f:
        for n in range(data // PIECE):
            os.pwrite(f.fileno(), generator.randbytes(PIECE), n * STRIDE * PIECE)
        f.truncate(size)
        os.fsync(f.fileno())


def change(path: Path, data: int, changed: int) -> None:
    generator = random.Random(2)
    blocks = generator.sample(range(data // BLOCK), changed // BLOCK)
    with path.open("r+b") as f:
        for block in sorted(blocks):
            piece, at = divmod(block * BLOCK, PIECE)
            os.pwrite(f.fileno(), generator.randbytes(BLOCK), piece * STRIDE * PIECE + at)
        os.fsync(f.fileno())


def cold(*paths: Path) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def wire(host: Host) -> int:
    """Bytes that its network device has moved, both ways."""
    for line in Path(f"/proc/{host.pid}/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "up0":
            words = figures.split()
            return int(words[0]) + int(words[8])
    raise RuntimeError("the host has no up0")


def cases(a: Host, b: Host, old: Path, device: str) -> Iterator[tuple[str, Callable[[], Sample]]]:
    source, target = (host.folder / "srv/image" for host in (a, b))

    def run(*words: str) -> Callable[[], Sample]:
        def once() -> Sample:
            target.unlink(missing_ok=True)
            subprocess.run(["cp", "--sparse=always", old, target], check=True)
            cold(source, target)
            before, start = wire(b), time.monotonic()
            subprocess.run(a.command(*words), check=True, stdout=subprocess.DEVNULL)
            seconds = time.monotonic() - start
            sent = wire(b) - before
            subprocess.run(["cmp", source, target], check=True)
            return {"seconds": seconds, "wire": sent / MIB}

        return once

    def read() -> Sample:
        cold(source, old)
        start = time.monotonic()
        both = [subprocess.Popen([sys.executable, "-c", READ, path]) for path in (source, old)]
        if sum(process.wait() for process in both):
            raise RuntimeError("a file cannot be read")
        return {"seconds": time.monotonic() - start}

    copy = ("pyploop", "-v-1", "copy", "--update", device, "b:/srv/image")
    yield "read both", read
    yield "pyploop --update --inplace", run(*copy, "--inplace")
    yield "pyploop --update", run(*copy)
    yield "rsync --inplace", run("rsync", "--inplace", "/srv/image", "b:/srv/image")


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring a copy on another host up to date.")
    parser.add_argument("--size", type=int, default=16 * 1024, metavar="MIB")
    parser.add_argument("--data", type=int, default=2048, metavar="MIB")
    parser.add_argument("--changed", type=int, default=160, metavar="MIB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on a disk")
    o = parser.parse_args()
    if o.data * STRIDE > o.size:
        parser.error("--size must be 8 times --data at least")
    with cleaned_up() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="u", dir=o.folder)))
        lab = stack.enter_context(hosts.lab(top))
        source = lab.a.folder / "srv/image"
        old = top / "old"
        make(old, o.size * MIB, o.data * MIB)
        subprocess.run(["cp", "--sparse=always", old, source], check=True)
        change(source, o.data * MIB, o.changed * MIB)
        device = stack.enter_context(loop_device(source))
        found = dict(cases(lab.a, lab.b, old, device))
        samples = in_turns(found, o.repeat, lambda text: print(text, file=sys.stderr, flush=True))
    reads = column(samples["read both"], "seconds")
    rows = []
    for name, values in samples.items():
        seconds, sent = column(values, "seconds"), column(values, "wire")
        over = ratio(sent, [float(o.changed)] * len(sent)).text() if sent else ""
        rows.append([name, ratio(seconds, [1.0] * len(seconds)).text(),
                     ratio(seconds, reads).text(), over])  # fmt: skip
    print(
        f"{o.size * MIB / GIB:g} GiB, {o.data} MiB of data, {o.changed} MiB changed in blocks of "
        f"4 KiB; median (range) of {o.repeat}\n"
    )
    head = ["", "seconds", "of reading both sides' data once", "on the wire, of what has changed"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
