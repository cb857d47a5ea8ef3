# SPDX-License-Identifier: Apache-2.0
"""A stage of a copy, and what was measured of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pyploop.units import format_size

LEAST = 3
"""Samples of a stage, however long they take."""
Unit = Literal["bytes/s", "s"]


@dataclass(frozen=True)
class Stage:
    """One stage, with the samples that show its spread."""

    name: str
    unit: Unit
    values: tuple[float, ...]
    """Bytes per second, or seconds."""
    note: str = ""
    """How it was measured; or, without values, why not."""

    @property
    def median(self) -> float:
        """0 without samples."""
        return statistics.median(self.values) if self.values else 0.0

    @property
    def low(self) -> float:
        return min(self.values, default=0.0)

    @property
    def high(self) -> float:
        return max(self.values, default=0.0)

    def text(self, value: float) -> str:
        if self.unit == "s":
            return f"{value * 1000:.2f} ms"
        return f"{format_size(value)}/s"


def rates(seconds: float, work: Callable[[], int]) -> tuple[float, ...]:
    """Bytes per second of each call of `work`, which returns how many bytes it has
    processed, 0 at the end.  It is called for so many seconds, and LEAST times."""
    values: list[float] = []
    end = time.monotonic() + seconds
    while len(values) < LEAST or time.monotonic() < end:
        began = time.monotonic()
        done = work()
        if not done:
            break
        values.append(done / max(time.monotonic() - began, 1e-9))
    return tuple(values)


def times(seconds: float, work: Callable[[], object], most: int = 1000) -> tuple[float, ...]:
    """Seconds of each call of `work`; at most so many."""
    values: list[float] = []
    end = time.monotonic() + seconds
    while len(values) < LEAST or (time.monotonic() < end and len(values) < most):
        began = time.monotonic()
        work()
        values.append(time.monotonic() - began)
    return tuple(values)
