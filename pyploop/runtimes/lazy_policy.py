# SPDX-License-Identifier: Apache-2.0
"""Whether memory is restored lazily: a pure function of what both hosts say and allow.  No
I/O, no clock (docs/internals/lazy-restore.md).

A lazy restore lets the container run at once, and loads its memory behind it.  It saves the
copy of that memory in the suspended time, and costs the start of the daemon, page faults, and
a process on which the container depends until all of its memory is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pyploop.units import MIB, format_size

Wanted = Literal["auto", "never", "always"]
WANTED: tuple[Wanted, ...] = ("auto", "never", "always")
NOT_LIVE = "this is not a live migration"
UNABLE = "this runtime does not load memory lazily"
LEAST = 64 * MIB
"""Bytes of memory that can come later, below which an eager restore is as fast
(docs/internals/lazy-restore.md has the measurement)."""
FORKED = 0.1
"""Part of that memory that forked processes may share: after a lazy restore each has its
own copy."""
OVERHEAD = 1 / 32
"""Of a container's memory, what the kernel uses for it in addition: page tables, above all."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why not lazily; empty: lazily."""

    why: str = ""

    @property
    def lazy(self) -> bool:
        return not self.why


@dataclass(frozen=True)
class Memory:
    """Of a container, in bytes."""

    private: int
    """Private, anonymous and not locked: it can come later."""
    forked: int
    """What of it is counted again for each process that shares it since a fork."""
    whole: int
    """All other memory that is dumped: it comes before the container runs."""


def memory_of(told: Any) -> Memory | None:
    """As the source tells it; None when it does not."""
    if not isinstance(told, dict) or "private" not in told:
        return None
    return Memory(*(int(told.get(name) or 0) for name in ("private", "forked", "whole")))


def wanted(target: Wanted, source: Wanted) -> Wanted:
    """The target's configuration wins over what the source asks for, unless it is auto."""
    return source if target == "auto" else target


def exceeds(memory: Memory, limit: int) -> str:
    """Why the container would exceed its memory limit of so many bytes (0: none), and be killed
    by the kernel, if each forked process had its own copy; empty: it would not."""
    needed = memory.private + memory.whole
    if not limit or memory.forked < MIB or needed + int(OVERHEAD * needed) <= limit:
        return ""
    return (
        f"{format_size(memory.forked)} of memory are shared by forked processes. With a copy for "
        f"each of them it would exceed the container's memory limit of {format_size(limit)}"
    )


def choose(want: Wanted, memory: Memory | None, limit: int = 0) -> Choice:
    """Before anything is known of the target's kernel.  memory: None when the source tells
    of none, which an older one does not.  limit: as for `exceeds`."""
    if want == "never":
        return Choice("not wanted")
    if memory is None:
        return Choice("the source does not tell what memory the container has")
    if why := exceeds(memory, limit):
        return Choice(why)
    if want == "always":
        return Choice()
    if memory.private < LEAST:
        return Choice(
            f"it does not pay: {format_size(memory.private)} of memory can come later, and "
            f"{format_size(LEAST)} are the least"
        )
    if memory.forked > FORKED * memory.private:
        return Choice(
            f"{format_size(memory.forked)} of memory are shared by forked processes, and would "
            "be there once for each of them"
        )
    return Choice()


def choose_again(want: Wanted, pages: int) -> Choice:
    """The dump is there, and so many bytes of its pages, and of those of memory rounds, can
    come later."""
    if want == "always" or pages >= LEAST:
        return Choice()
    return Choice(
        f"it does not pay: {format_size(pages)} of the dump can come later, and "
        f"{format_size(LEAST)} are the least"
    )
