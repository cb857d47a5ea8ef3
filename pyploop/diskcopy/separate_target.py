# SPDX-License-Identifier: Apache-2.0
"""Before the first byte: refuse a target that lies on its own source, or is a part of
it."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator

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


def check_receipt(source: Source, points: Iterable[str], path: str, *, frozen: bool) -> None:
    """ParameterError when the receipt would be written over the source.  frozen: it is written
    before the thaw, so it must not lie on what is frozen either."""
    if os.path.exists(path):
        with _pinned(path) as fd:
            if is_below(source, fd):
                raise ParameterError(
                    f"--receipt {path} is a file in which {source.path} itself is stored: it would "
                    "destroy the source; nothing was copied",
                    path=path,
                )
    if not frozen:
        return
    with _pinned(os.path.dirname(os.path.realpath(path))) as fd:
        if both := of_file(fd).things & apart_from(source, points):
            raise ParameterError(
                f"--receipt {path} lies on {in_words(both)}, which is frozen when it is written "
                "for the --before-thaw command; nothing was copied",
                path=path,
                hint="name a file on another file system",
            )


@contextlib.contextmanager
def _pinned(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


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
