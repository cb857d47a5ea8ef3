# SPDX-License-Identifier: Apache-2.0
"""Freezing file systems for a snapshot: `frozen`."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pyploop.api.reporting import make_reporter
from pyploop.errors import DeviceControlError, LoopError, OpenError, ParameterError
from pyploop.freeze.deadline import Deadline, Limits
from pyploop.freeze.filesystems import FileSystems
from pyploop.freeze.session import FreezeSession
from pyploop.report.events import Reporter
from pyploop.system import mount_table, sysblock
from pyploop.system.mount_table import Mount
from pyploop.undo.ledger import UndoLedger

if TYPE_CHECKING:
    from pyploop.report.event_types import Event


class Frozen:
    """File systems that are frozen now."""

    def __init__(self, mounts: list[str], session: FreezeSession) -> None:
        self.mounts = tuple(mounts)
        """Their mount points."""
        self._session = session

    def check(self) -> None:
        """LoopError when one of them is frozen no more: what was read may be torn."""
        self._session.check()


@contextlib.contextmanager
def frozen(
    path: str | os.PathLike[str],
    *,
    limit: float = 60.0,
    on_event: Callable[[Event], None] | None = None,
) -> Iterator[Frozen]:
    """Freeze what is mounted from a block device, or the file system that a folder is on,
    while the body runs (FIFREEZE): for tools that take a snapshot.

    limit: seconds.  A separate process thaws when they have passed, when this process
    dies, and when it hangs.  The body must not write to what is frozen, nor wait for who
    does: that would wait for the thaw.

    After the body the file systems are thawed.  LoopError is raised then if one of them
    was not frozen to the end, so that the snapshot is not to be used.  Before it:
    OpenError (nothing is mounted, or there is no such path), ParameterError (the folder is
    on no disk), DeviceControlError (it cannot be frozen), BusyError (another copy keeps it
    frozen).
    """
    if limit <= 0:
        raise ParameterError(f"limit={limit:g}: a freeze needs a limit of more than 0 s")
    name = os.fspath(path)
    report = make_reporter(on_event)
    plan = UndoLedger(f"freeze of {name}", report)
    limits = Limits.of(limit)
    with contextlib.ExitStack() as undo:
        undo.callback(plan.close)
        # A silent reporter: the notes of FileSystems are about a copy.
        systems = FileSystems(_mounts_of(name), Reporter(), plan)
        undo.callback(systems.close)
        session = FreezeSession((), systems, plan, report, Deadline(time.monotonic))
        systems.try_out()
        if systems.unfreezable:
            raise DeviceControlError(
                f"cannot freeze {', '.join(systems.unfreezable)}: this kind of file system has no "
                "freeze; nothing was frozen",
                path=name,
            )
        session.prepare()
        systems.sync()  # so that the freeze is short
        with report.deferred(), session.undo_on_failure():
            start = time.monotonic()
            session.stop(limits)
            systems.freeze()
            yield Frozen(systems.points, session)
            try:
                session.check()
            except LoopError as e:
                if time.monotonic() - start < limits.watchdog:
                    raise
                raise LoopError(
                    f"the freeze of {name} lasted longer than its limit of {limit:g} s: it was "
                    "thawed, and what was read in it may be inconsistent",
                    path=name,
                    hint="allow more time (limit=), and take the snapshot again",
                ) from e
            session.release(resume=True)


def _mounts_of(path: str) -> list[Mount]:
    try:
        st = os.stat(path)
    except OSError as e:
        raise OpenError.of(f"cannot open {path}", e, path=path) from e
    if stat.S_ISBLK(st.st_mode):
        device = sysblock.find((os.major(st.st_rdev), os.minor(st.st_rdev)))
        found = mount_table.mounts_of(sysblock.stacked_on(device), Path("/proc/self/mountinfo"))
        if not found:
            raise OpenError(
                f"nothing is mounted from {path}: there is nothing to freeze", path=path
            )
        return found
    if not stat.S_ISDIR(st.st_mode):
        raise ParameterError(f"{path} is neither a block device nor a folder", path=path)
    entry = mount_table.holding(os.path.realpath(path))
    if entry is None:
        raise OpenError(
            f"{path} is on a file system that is not mounted in this mount namespace", path=path
        )
    return [Mount(entry.point, entry.fstype, entry.source)]
