# SPDX-License-Identifier: Apache-2.0
"""Both ends of a copy that goes on from a kept file, in one process; no fixtures here.

going_on.py SOURCE HELD WRITE…     WRITE: POSITION:LENGTH:BYTE, into the device of
                                   LOOP= in the environment, after the comparison
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyploop.diskcopy import delta, digests
from pyploop.diskcopy.d1_target import StreamOutput
from pyploop.diskcopy.digests import Reader
from pyploop.diskcopy.options import Options, Summary
from pyploop.diskcopy.receiver import receive
from pyploop.diskcopy.sender import Sender
from pyploop.disks import opening
from pyploop.migration.target.resumable_target import ResumableSink, lease
from pyploop.report.events import Reporter
from pyploop.system.jobs import Job
from pyploop.trackers.registry import choose


@dataclass
class Copied:
    summary: Summary
    found: delta.Reused
    target: bytes
    inode: int


def tell(fd: int, size: int) -> tuple[Reader, Job[None]]:
    """A kept file's digests, on their way."""
    ours, theirs = socket.socketpair()
    os.ftruncate(fd, size)

    def work() -> None:
        with theirs:
            digests.send(fd, size, theirs)

    return Reader(ours.detach(), 10), Job(work).start()


def go_on(
    source: Path,
    held: Path,
    meanwhile: Callable[[], None] = lambda: None,
    target: str = "target",
    stop: Callable[[], None] = lambda: None,
) -> Copied:
    """Copy the source into what was kept, as a migration does; `meanwhile` happens
    when they were compared, `stop` before the last blocks."""
    report, final = Reporter(), held.with_name(target)
    src = opening.open_source(str(source))
    fd = os.open(held, os.O_RDWR)
    lease(fd)
    reader, telling = tell(fd, src.size)
    a, b = socket.socketpair()
    sink = ResumableSink(str(final), str(held), fd, src.size, leased=True)
    job = Job(lambda: receive(str(final), b.fileno(), None, report, 10, sink=sink)).start()
    try:
        out = StreamOutput(
            a.fileno(),
            a.fileno(),
            report,
            two_way=True,
            sync_wait=0,
            answer_timeout=10,
            compat="native",
        )
        with Sender(src, choose("auto", src), out, Options(stall=10), report) as sender:
            found = sender.reuse(reader)
            meanwhile()
            sender.first_pass()
            sender.converge()
            sender.prepare_freeze()
            stop()
            with sender.frozen():
                sender.last_blocks()
                sender.finish()
        telling.join(10)
        job.join(10)
    finally:
        src.close()
        reader.close()
        a.close()
        b.close()
    return Copied(sender.summary, found, final.read_bytes(), final.stat().st_ino)


def main(source: str, held: str, *writes: str) -> None:
    def write() -> None:
        fd = os.open(os.environ["LOOP"], os.O_WRONLY | os.O_DIRECT)
        for text in writes:
            pos, length, byte = (int(n) for n in text.split(":"))
            with mmap.mmap(-1, length) as page:
                page.write(bytes([byte]) * length)
                os.pwrite(fd, page, pos)
        os.close(fd)

    copied = go_on(Path(source), Path(held), write, target="finished")
    print(copied.summary.tracker, copied.found.same)


if __name__ == "__main__":
    main(*sys.argv[1:])
