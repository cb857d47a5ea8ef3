# SPDX-License-Identifier: Apache-2.0
"""Before the first byte: refuse a target that lies on its own source, or is a part of
it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from pyploop.diskcopy.target import Output
from pyploop.disks.backing import apart_from, in_words, is_below, of_file
from pyploop.disks.source import Source
from pyploop.errors import ParameterError


def check(source: Source, points: Iterable[str], out: Output) -> None:
    """ParameterError when the target lies on the source, or the source on the target, as
    far as that is known yet.  A pyploop peer gets the reason.  points: mount points that
    will be frozen."""
    check_output(source, out.fd)
    both = (out.things() or set()) & apart_from(source, points)
    if not both:
        return
    error = ParameterError(
        f"the target lies on {in_words(both)}, which is part of the source and will be frozen: "
        "writing it would never end; nothing was copied",
        path=source.path,
        hint="choose a target on another file system",
    )
    out.refuse(error)
    raise error


def check_output(source: Source, fd: int) -> None:
    """ParameterError when the source is stored in this open file."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        _check_device(source, fd)
    elif is_below(source, fd):
        raise ParameterError(
            f"the output is a file in which {source.path} itself is stored: to copy onto it would "
            "destroy the source; nothing was written",
            path=source.path,
            hint="choose another file for the output",
        )


def _check_device(source: Source, fd: int) -> None:
    """ParameterError when the device open as `fd` shares bytes with the source."""
    shared = of_file(fd).things & apart_from(source, ())
    if shared or is_below(source, fd):
        what = in_words(shared) if shared else "it"
        raise ParameterError(
            f"the target device is, has below it, or is below the source {source.path} ({what}): "
            "to copy onto it would destroy the source; nothing was written",
            path=source.path,
            hint="choose another device for the target",
        )
