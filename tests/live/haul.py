# SPDX-License-Identifier: Apache-2.0
"""One end of a migration in the manner of p.haul: several disks, a socket for
each, all through `import libploop` (the alias; tests/live/test_haul.py).

    haul.py source DDXML FD [DDXML FD ...]
    haul.py target DELTA FD BACKING [DELTA FD BACKING ...]

The source reads commands (start, next, stop, or `threads`: all of that for each disk
in a thread of its own) from stdin, the target serves at once.  Each answers in
lines of JSON: {"sent": bytes} or {"error": reason}; the target one for each
disk, when its receiver has ended.

HAUL_TRUTH: the target, about to answer END, copies the source's BACKING file
to DELTA.truth: then the source waits, frozen.  HAUL_HOLD: the target makes that
file and waits until it is gone, before it answers END.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libploop  # type: ignore[import-not-found]

from pyploop import _core
from pyploop.diskcopy.replies import Replies
from pyploop.wire import d1


def tell(**what: object) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")  # threads do not mix their lines


class Source:
    def __init__(self, disks: list[tuple[str, int]]) -> None:
        self._copies = [libploop.ploopcopy(ddxml, fd) for ddxml, fd in disks]

    def start(self) -> int:
        return sum(c.copy_start() for c in self._copies)

    def next(self) -> int:
        return sum(c.copy_next_iteration() for c in self._copies)

    def stop(self) -> int:
        return sum(c.copy_stop() for c in self._copies)

    def threads(self) -> int:
        results: list[Any] = []

        def whole(copy: Any) -> None:
            try:
                sent = copy.copy_start() + copy.copy_next_iteration()
                results.append(sent + copy.copy_next_iteration() + copy.copy_stop())
            except RuntimeError as e:
                results.append(e)

        threads = [threading.Thread(target=whole, args=[c]) for c in self._copies]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for r in results:
            if isinstance(r, RuntimeError):
                raise r
        return sum(results)

    def serve(self) -> None:
        for line in sys.stdin:
            step: Callable[[], int] = getattr(self, line.strip())
            try:
                tell(sent=step())
            except RuntimeError as e:
                tell(error=str(e))


class DeltaReceiver(threading.Thread):
    def __init__(self, delta: str, fd: int) -> None:
        super().__init__()
        self._delta, self._fd = delta, fd

    def run(self) -> None:
        try:
            libploop.ploopcopy_receiver(self._delta, self._fd)
            tell(disk=self._delta)
        except RuntimeError as e:
            tell(disk=self._delta, error=str(e))


def watch_ends(disks: list[tuple[str, int, str]]) -> None:
    """What HAUL_TRUTH and HAUL_HOLD ask for."""
    by_fd = {fd: (delta, backing) for delta, fd, backing in disks}
    done = Replies.done

    def done_later(self: Replies, event: int, times: d1.Times) -> None:
        delta, backing = by_fd[self._fd]
        if event == _core.RECV_END and "HAUL_TRUTH" in os.environ:
            shutil.copyfile(backing, delta + ".truth")
        if event == _core.RECV_END and "HAUL_HOLD" in os.environ:
            hold = Path(os.environ["HAUL_HOLD"])
            hold.touch()
            while hold.exists():
                time.sleep(0.01)
        done(self, event, times)

    Replies.done = done_later  # type: ignore[method-assign]


def main(role: str, words: list[str]) -> None:
    if role == "source":
        Source([(words[k], int(words[k + 1])) for k in range(0, len(words), 2)]).serve()
        return
    disks = [(words[k], int(words[k + 1]), words[k + 2]) for k in range(0, len(words), 3)]
    watch_ends(disks)
    receivers = [DeltaReceiver(delta, fd) for delta, fd, _ in disks]
    for receiver in receivers:
        receiver.start()
    for receiver in receivers:
        receiver.join()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
