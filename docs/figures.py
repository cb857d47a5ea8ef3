# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of docs/figures from data.

    python docs/figures.py [FOLDER]

- architecture.svg: how data and control go, from figures/architecture.toml
- rooms.svg: the packages and their floors, from the table that tests/unit/test_layers.py checks
- timeline.svg: the time line of a freeze, medians of internals/data/freeze.ndjson
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FIGURES = HERE / "figures"
RECORDED = HERE / "internals" / "data" / "freeze.ndjson"
HOST = "#f2f4f7"
COLORS = {"data": "#1b7837", "control": "#2166ac", "guard": "#b2182b", "outside": "#888888"}

KINDS = {
    **dict.fromkeys(("disks", "trackers", "diskcopy"), "data"),
    **dict.fromkeys(("freeze", "undo", "usage"), "guard"),
    **dict.fromkeys(("runtimes", "migration"), "control"),
}
STEPS = {
    "stop": "#bdbdbd",
    "stop command": "#bdbdbd",
    "sync": "#80b1d3",
    "source sync": "#80b1d3",
    "freeze": "#8073ac",
    "prove": "#fccde5",
    "send": "#fdb462",
    "last blocks": "#fdb462",
    "target": "#b3de69",
    "target commit": "#b3de69",
}
"""The steps that the freeze's time line shows, and their colors; like steps alike."""


def load(path: Path) -> ModuleType:
    """A module by its path: tests and bench are no packages."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


svg = load(ROOT / "bench" / "svg.py")


def frame(d: Any, at: Sequence[float], ink: str) -> None:
    """A white box with a border.  at: x, y, width, height."""
    x, y, w, h = at
    d.rect(x, y, w, h, ink)
    d.rect(x + 1.5, y + 1.5, w - 3, h - 3, "white")


def arrow(d: Any, points: list[list[float]], ink: str) -> None:
    """Lines along the points, with a head at the last one.  Only horizontal and
    vertical lines."""
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        d.line(x1, y1, x2, y2, ink=ink, wide=2)
    (x1, y1), (x2, y2) = points[-2:]
    if y1 == y2:
        back = -8 if x2 > x1 else 8
        ends = ((x2 + back, y2 - 5), (x2 + back, y2 + 5))
    else:
        back = -8 if y2 > y1 else 8
        ends = ((x2 - 5, y2 + back), (x2 + 5, y2 + back))
    for x, y in ends:
        d.line(x, y, x2, y2, ink=ink, wide=2)


def architecture(table: dict[str, Any]) -> Any:
    """Boxes and arrows; each box names the package that does it."""
    size = table["size"]
    d = svg.Drawing(size[0], size[1], table["title"])
    for host in table["host"]:
        x, y, w, h = host["at"]
        d.rect(x, y, w, h, HOST)
        d.text(x + 12, y + 20, host["name"], bold=True, size=13)
    for box in table["box"]:
        x, y, w, h = box["at"]
        ink = COLORS[box["kind"]]
        frame(d, (x, y, w, h), ink)
        middle, lines = x + w / 2, box["text"]
        top = y + h / 2 - 8 * (len(lines) - 1) + (0 if box.get("package") else 4)
        for n, line in enumerate(lines):
            d.text(middle, top + 15 * n, line, anchor="middle", bold=n == 0, size=12)
        if box.get("package"):
            d.text(middle, y + h - 8, box["package"], anchor="middle", size=10, ink="#666")
    for one in table["arrow"]:
        arrow(d, one["points"], COLORS[one["kind"]])
        if "text" in one:
            x, y = one["label"]
            d.text(x, y, one["text"], anchor=one.get("anchor", "middle"), size=11, ink="#444")
    return d


def rooms() -> Any:
    """The floors, the ground floor at the bottom."""
    floors = load(ROOT / "tests" / "unit" / "test_layers.py").FLOORS
    row, left, width = 30.0, 44.0, 660.0
    height = 48 + row * len(floors)
    d = svg.Drawing(left + width + 16, height, "The rooms of pyploop and their floors")
    d.text(16, 22, "A package imports only what is below its floor", bold=True, size=14)
    for floor, names in enumerate(floors):
        y = 36 + row * (len(floors) - 1 - floor)
        d.text(left - 10, y + 18, str(floor), anchor="end", ink="#888", size=11)
        each = width / len(names)
        for n, name in enumerate(names):
            ink = COLORS[KINDS.get(name.split(".")[0], "outside")]
            frame(d, (left + each * n, y, each - 6, row - 5), ink)
            d.text(left + each * n + each / 2 - 3, y + 17, name, anchor="middle", size=12)
    return d


def timeline(records: list[dict[str, Any]], load_name: str, other: str) -> Any:
    """What the freeze consists of, for pyploop and another tool: two lanes in
    milliseconds, each step as wide as its median."""
    left, width, top = 140.0, 560.0, 74.0
    lanes = {}
    runs: list[dict[str, float]] = []
    for mode in (other, "pyploop"):
        runs = [r["steps"] for r in records if (r["load"], r["mode"]) == (load_name, mode)]
        order = dict.fromkeys(name for steps in runs for name in steps if name in STEPS)
        lanes[mode] = {k: statistics.median(s.get(k, 0.0) for s in runs) for k in order}
    longest = max(sum(steps.values()) for steps in lanes.values())
    d = svg.Drawing(left + width + 90, top + 170, "The time line of a freeze")
    words = "How long the disk stands still: from the stop command until the target is durable"
    d.text(16, 22, words, bold=True, size=14)
    words = f"ext4 under {load_name}; medians of {len(runs)} copies, in milliseconds"
    d.text(16, 40, words, ink="#666")
    for number, (mode, steps) in enumerate(lanes.items()):
        y = top + 92 * number
        name = "pyploop" if mode == "pyploop" else f"ploop copy {mode}"
        d.text(left - 10, y + 20, name, anchor="end", bold=True)
        x = left
        for n, (step, seconds) in enumerate(steps.items()):
            w = width * seconds / longest
            d.rect(x, y, w, 30, STEPS[step])
            x += w
            column, line = divmod(n, 2)
            at = left + 190 * column
            d.rect(at, y + 38 + 18 * line, 11, 11, STEPS[step])
            d.text(at + 16, y + 48 + 18 * line, f"{step}: {seconds * 1e3:.1f}", size=11)
        d.text(x + 8, y + 20, f"{sum(steps.values()) * 1e3:.0f} ms", bold=True)
    return d


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = tomllib.loads((FIGURES / "architecture.toml").read_text())
    architecture(table).write(folder / "architecture.svg")
    rooms().write(folder / "rooms.svg")
    records = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    timeline(records, "sqlite", "1.15").write(folder / "timeline.svg")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES)
