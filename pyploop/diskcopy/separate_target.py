# SPDX-License-Identifier: Apache-2.0
"""A target that lies on its own source, or is a part of it, is refused before the
first byte."""

from __future__ import annotations

from collections.abc import Iterable

from pyploop.diskcopy.target import Output
from pyploop.disks.backing import apart_from, in_words, is_below
from pyploop.disks.source import Source
from pyploop.errors import ParameterError


def check(source: Source, points: Iterable[str], out: Output) -> None:
    """ParameterError when something of the source lies below the target, as far as
    that is known yet (a peer of ours is told), or the target below the source.
    points: mount points to be frozen."""
    check_output(source, out.fd)
    both = (out.things() or set()) & apart_from(source, points)
    if not both:
        return
    error = ParameterError(
        f"the target lies on {in_words(both)}, which is part of the source and will be frozen: "
        "writing it would never end; nothing was copied"
    )
    out.refuse(error)
    raise error


def check_output(source: Source, fd: int) -> None:
    """ParameterError when the source is stored in this open file."""
    if is_below(source, fd):
        raise ParameterError(
            f"the output is a file in which {source.path} itself is stored: to copy onto it would "
            "destroy the source; nothing was written"
        )
