# SPDX-License-Identifier: Apache-2.0
"""Which kind of target a path becomes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyploop.diskcopy.target_file import Sink
from pyploop.report.events import Reporter

if TYPE_CHECKING:
    from pyploop.diskcopy.target_device import DeviceSink


@dataclass(frozen=True)
class Wanted:
    """What the target is to be."""

    to_device: bool = False
    update: bool = False
    """It may be there: then it is an older copy, and only what differs is sent."""
    inplace: bool = False
    """With `update`: that copy itself is written to."""
    partial: bool = False
    """What a failed copy has is left for the next one."""


NEW_FILE = Wanted()


def open_sink(
    target: str, report: Reporter, wanted: Wanted, *, owner_undoes: bool = False
) -> Sink | DeviceSink:
    """A new file; a device, or a file, that is there.  owner_undoes: as Sink, of a new file.
    PyploopError."""
    if wanted.to_device:
        from pyploop.diskcopy.target_device import DeviceSink  # few need it

        return DeviceSink(target, report, update=wanted.update)
    replace = wanted.update and os.path.lexists(target)
    if wanted.update and not replace:
        report.note(f"There is no {target} to update: it will be a new file")
    if not (replace or wanted.partial):
        return Sink(target, report, owner_undoes=owner_undoes)
    from pyploop.diskcopy.target_update import InPlaceSink, UpdateSink

    if replace and wanted.inplace:
        return InPlaceSink(target, report)
    return UpdateSink(target, report, replace=replace, partial=wanted.partial)
