# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/internals/frozen-time.md: freeze_report.py --plots FOLDER."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from common import Figure
from freeze_report import FACTOR, MODES, OURS, PARTS, SLACK, Record, names, parts, select
from svg import Drawing

LABELS = {
    "1.10": "1.10: no sync before",
    "1.11": "1.11: sync, 5 s sleep",
    "1.15": "1.15: feedback",
    "pyploop": "pyploop",
}
INK = {"1.10": "#9e9e9e", "1.11": "#e08214", "1.15": "#2166ac", "pyploop": "#1b7837"}
FILL = {
    "stop": "#bdbdbd",
    "source sync": "#80b1d3",
    "FIFREEZE": "#8073ac",
    "send": "#fdb462",
    "target": "#b3de69",
    "other": "#d9d9d9",
}
GRID = "#e4e4e4"
LEFT, WIDTH, RIGHT = 150.0, 560.0, 60.0
TOP, ROW, GAP = 64.0, 22.0, 36.0
DECADES = (0.001, 0.01, 0.1, 1.0)


def write(records: Sequence[Record], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    windows(records).write(folder / "freeze-windows.svg")
    shares(records).write(folder / "freeze-steps.svg")
    if any(r.get("predicted") is not None for r in records):
        predictions(records).write(folder / "freeze-predicted.svg")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def scale(low: float, high: float) -> Callable[[float], float]:
    """Seconds to pixels, logarithmic."""
    per_decade = WIDTH / math.log10(high / low)
    return lambda value: LEFT + per_decade * math.log10(max(value, low) / low)


def windows(records: Sequence[Record]) -> Drawing:
    """Every window, by load and kind of copy."""
    loads = names(records, "load")
    low, high = DECADES[0], 3.0
    at = scale(low, high)
    panel = ROW * len(MODES)
    height = TOP + len(loads) * (panel + GAP)
    d = Drawing(LEFT + WIDTH + RIGHT, height, "Frozen time of the disk")
    d.text(LEFT, 20, "Frozen time of the disk: stop command to durable target", size=14, bold=True)
    d.text(LEFT, 36, "one dot a copy, a bar at the median; logarithmic", ink="#666")
    for number, load in enumerate(loads):
        top = TOP + number * (panel + GAP)
        d.text(LEFT, top - 4, load, bold=True)
        for decade in DECADES:
            for step in range(1, 10):
                if low <= decade * step <= high:
                    x = at(decade * step)
                    d.line(x, top, x, top + panel, ink=GRID if step > 1 else "#bbb")
            d.text(at(decade), top + panel + 13, milliseconds(decade), anchor="middle", size=10)
        for row, mode in enumerate(MODES):
            values = [r["durable"] for r in select(records, load, mode)]
            y = top + ROW * (row + 0.5)
            d.text(LEFT - 8, y + 4, LABELS[mode], anchor="end", ink=INK[mode], size=11)
            for value in values:
                d.dot(at(value), y, INK[mode])
            if values:
                median = Figure.of(values).median
                d.line(at(median), y - 8, at(median), y + 8, ink=INK[mode], wide=2.5)
                d.text(at(max(values)) + 8, y + 4, milliseconds(median), size=11)
    return d


def shares(records: Sequence[Record]) -> Drawing:
    """Of what each window consists: medians of the steps, each load with a
    scale of its own."""
    loads = names(records, "load")
    panel = ROW * len(MODES)
    height = TOP + 20 + len(loads) * (panel + GAP)
    d = Drawing(LEFT + WIDTH + RIGHT, height, "What the frozen time consists of")
    d.text(LEFT, 20, "What the frozen time consists of", size=14, bold=True)
    d.text(LEFT, 36, "medians of the steps; each load has its own scale", ink="#666")
    x = LEFT
    for part in PARTS:
        d.rect(x, 46, 12, 12, FILL[part])
        d.text(x + 16, 56, part, size=11)
        x += 100
    for number, load in enumerate(loads):
        top = TOP + 20 + number * (panel + GAP)
        medians = {mode: _medians(select(records, load, mode)) for mode in MODES}
        longest = max(sum(steps.values()) for steps in medians.values()) or 1.0
        d.text(LEFT, top - 4, load, bold=True)
        for row, mode in enumerate(MODES):
            y = top + ROW * row
            x = LEFT
            for part, seconds in medians[mode].items():
                width = seconds / longest * WIDTH
                d.rect(x, y + 3, width, ROW - 6, FILL[part])
                x += width
            d.text(LEFT - 8, y + ROW / 2 + 4, LABELS[mode], anchor="end", ink=INK[mode], size=11)
            d.text(x + 6, y + ROW / 2 + 4, milliseconds(sum(medians[mode].values())), size=11)
    return d


def _medians(runs: Sequence[Record]) -> dict[str, float]:
    if not runs:
        return {}
    each = [parts(r) for r in runs]
    return {part: Figure.of([p[part] for p in each]).median for part in each[0]}


def predictions(records: Sequence[Record]) -> Drawing:
    """Predicted against actual, with the line that 95 % must stay below."""
    runs = [r for r in records if r.get("predicted") is not None]
    top, size = 64.0, 400.0
    largest = max(float(r[key]) for r in runs for key in ("predicted", "actual"))
    step = 0.01 * math.ceil(largest * 1.05 / 0.06)
    most = 6 * step
    d = Drawing(LEFT + size + RIGHT, top + size + 50, "Predicted and actual freeze")
    d.text(LEFT - 60, 20, "Freezes as predicted and as they were, ms", size=14, bold=True)
    d.text(LEFT - 60, 36, "thin: as predicted; thick: 1.5 x that + 20 ms", ink="#666")

    def x(seconds: float) -> float:
        return LEFT + size * (seconds / most)

    def y(seconds: float) -> float:
        return top + size * (1 - seconds / most)

    for k in range(7):
        value = step * k
        d.line(x(value), y(0), x(value), y(most), ink=GRID)
        d.line(x(0), y(value), x(most), y(value), ink=GRID)
        d.text(x(value), y(0) + 16, f"{value * 1e3:.0f}", anchor="middle", size=10)
        d.text(x(0) - 6, y(value) + 4, f"{value * 1e3:.0f}", anchor="end", size=10)
    d.text(LEFT + size / 2, top + size + 36, "predicted", anchor="middle")
    d.text(x(0) - 30, top + size / 2, "actual", anchor="end")
    end = (most - SLACK) / FACTOR
    d.line(x(0), y(SLACK), x(end), y(FACTOR * end + SLACK), wide=2)
    d.line(x(0), y(0), x(most), y(most))
    inks = dict(zip(names(runs, "load"), INK.values(), strict=False))
    for number, (load, ink) in enumerate(inks.items()):
        d.dot(x(0) + 14, top + 16 + 16 * number, ink)
        d.text(x(0) + 24, top + 20 + 16 * number, load, size=11)
        for r in select(runs, load, OURS):
            d.dot(x(r["predicted"]), y(r["actual"]), ink)
    return d
