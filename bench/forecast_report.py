# SPDX-License-Identifier: Apache-2.0
"""How well the suspended times of a bench were forecast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from common import Figure

FACTOR, SECONDS = 1.3, 0.03
"""A forecast is near when the longer of both times is at most the shorter one times FACTOR,
and SECONDS more."""


def forecast_of(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """For a sample: the event `suspended` of a migration; empty when it has none."""
    found = [e for e in events if e["event"] == "suspended"]
    return {"forecast": dict(found[-1])} if found else {}


def near(forecast: float, actual: float) -> bool:
    low, high = sorted((forecast, actual))
    return high <= FACTOR * low + SECONDS


def line(samples: Iterable[Mapping[str, Any]]) -> str:
    """A sentence about the samples that have a forecast; empty when none has."""
    both = [
        (s["forecast"]["forecast"], s["forecast"]["actual"]) for s in samples if "forecast" in s
    ]
    if not both:
        return ""
    ratios = Figure.of([actual / forecast for forecast, actual in both])
    close = sum(near(forecast, actual) for forecast, actual in both)
    return (
        f"Suspended time over its forecast: {ratios.text(2)}; {close} of {len(both)} within "
        f"{FACTOR:g} times and {SECONDS * 1000:.0f} ms of each other."
    )
