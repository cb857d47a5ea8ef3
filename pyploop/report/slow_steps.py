# SPDX-License-Identifier: Apache-2.0
"""Report once what a step waits for when it takes long, such as storage that hangs.

This runs in a thread that shares no lock with the copy.  So when the log is a file on the
frozen source, only this thread blocks.
"""

from __future__ import annotations

import threading

from pyploop.report.events import Reporter
from pyploop.report.timeline import Recorder

LONG = 5.0
"""Seconds after which a step is reported."""
LOOK = 0.5
"""Seconds between two checks."""
WORDS = {
    "stop command": "the stop of the source to end",
    "source sync": "the source to write back what is dirty (syncfs): the storage below may hang",
    "freeze": "the source's file systems to freeze: the storage below may hang",
    "prove": "the source's last writes to complete",
    "last blocks": "the last blocks to be read and sent",
    "repair": "blocks to be compared",
    "target sync": "the target to sync its data",
    "target commit": "the target to become durable",
    "before thaw": "the --before-thaw command to end",
    "thaw": "the source's file systems to thaw: the storage below may hang",
}
"""Step of the recorder -> what it waits for.  Other steps show their progress."""


class SlowSteps:
    """Watches the steps of one copy until `close`."""

    def __init__(self, recorder: Recorder, report: Reporter, what: str) -> None:
        """what: the name of the source in messages."""
        self._recorder, self._report, self._what = recorder, report, what
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        reported = None
        while not self._over.wait(LOOK):
            step = self._recorder.doing
            if step is None or step is reported or step.name not in WORDS:
                continue
            if self._recorder.now() - step.start >= LONG:
                reported = step
                self._report.at_once(
                    f"{self._what}: waiting for {WORDS[step.name]} (for {LONG:g} s now)"
                )

    def close(self) -> None:
        self._over.set()
        self._thread.join(LOOK)
