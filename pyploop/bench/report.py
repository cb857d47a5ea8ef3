# SPDX-License-Identifier: Apache-2.0
"""The lines of the table, and what it means in words."""

from __future__ import annotations

from pyploop.bench.forecast import Copy
from pyploop.bench.stages import Stage
from pyploop.units import format_size

NAMES = 18
"""Characters of the longest name of a stage."""


def line(s: Stage) -> str:
    """Median, range, how it was measured."""
    if not s.values:
        return f"{s.name:{NAMES}}  {'-':>12}  {s.note}".rstrip()
    spread = f"({s.text(s.low)} .. {s.text(s.high)})"
    return f"{s.name:{NAMES}}  {s.text(s.median):>12}  {spread:31} {s.note}".rstrip()


def sentences(copy: Copy, source: str, target: str, *, frozen: bool) -> list[str]:
    """frozen: how long a freeze takes was measured."""
    if not copy.limit:
        return [f"Nothing was measured that a copy of {source} to {target} would wait for."]
    said = [
        f"A copy of {source} to {target} is limited by {copy.limit}: "
        f"{format_size(copy.rate)} a second."
    ]
    if copy.seconds is None:
        said.append(
            "More is written to the source in that time than can be copied. So the copy would "
            "not end by itself: slow the writer down (--throttle), or stop it."
        )
        return said
    said.append(f"Its {format_size(copy.data)} of data take about {duration(copy.seconds)}.")
    if copy.freeze is not None:
        said.append(
            f"The freeze at its end is expected to last about {copy.freeze * 1000:.0f} ms, with "
            f"{format_size(copy.rest)} to send."
            + ("" if frozen else " Freezing itself was not measured (--freeze).")
        )
    return said


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{max(seconds, 0.1):.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
