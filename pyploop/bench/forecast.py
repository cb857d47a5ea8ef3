# SPDX-License-Identifier: Apache-2.0
"""What limits a copy, how long it takes, and how long its freeze.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyploop.bench.stages import Stage
from pyploop.diskcopy.freeze_policy import Costs, Measured, Round, forecast

WINDOW = 0.05
"""Seconds of writing that the last round before the freeze leaves, when rounds keep up."""
ROUND_TRIPS = 9
"""Requests and answers of a remote copy before its first byte, once ssh has connected."""
FEWEST = 0.002
"""Seconds of that round, at least."""


@dataclass(frozen=True)
class Copy:
    """What a copy of the source to the target is expected to be."""

    data: int
    """Bytes of data of the source, without holes."""
    limit: str
    """The stage that is slower than all others; empty: none was measured."""
    rate: float
    """Bytes per second of it."""
    seconds: float | None
    """Of the whole copy, with its connections; None: not known, or it never ends."""
    freeze: float | None
    """Seconds; None: not known."""
    rest: int
    """Bytes that are sent in the freeze."""


def expected(
    data: int,
    stages: Sequence[Stage],
    *,
    dirty: float,
    costs: Costs,
    setup: float = 0.0,
) -> Copy:
    """stages: those that each byte passes, at the same time.  dirty: bytes per second that
    are written to the source.  setup: seconds until the first byte."""
    slowest = min((s for s in stages if s.values), key=lambda s: s.median, default=None)
    if slowest is None or slowest.median <= 0:
        return Copy(data, "", 0.0, None, None, 0)
    rate = slowest.median
    if dirty >= rate:
        return Copy(data, slowest.name, rate, None, None, 0)
    first = data / rate
    # Each round sends what was written during the one before: a geometric series.
    seconds = setup + first / (1 - dirty / rate)
    last = max(WINDOW * dirty / rate, FEWEST)
    done = Measured(
        Round(data, first, first),
        [Round(int(WINDOW * dirty), last, max(WINDOW, last))],
        costs,
    )
    f = forecast(done)
    return Copy(data, slowest.name, rate, seconds, f.total, f.left)
