# SPDX-License-Identifier: Apache-2.0
"""What bench_freeze recorded, as tables and plots.

python3 bench/freeze_report.py freeze.ndjson [--plots FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Figure, table

Record = dict[str, Any]

LOADS = ("idle", "fsync", "buffered", "sqlite")
MODES = ("1.10", "1.11", "1.15", "pyploop")
OURS = "pyploop"
OTHER = "other"
"""Another pyploop, for comparison; only when it was asked for."""
PARTS = {
    "stop": ("stop", "stop command"),
    "source sync": ("sync", "source sync"),
    "FIFREEZE": ("freeze",),
    "send": ("send", "prove", "last blocks", "repair"),
    "target": ("target", "target sync", "target commit"),
}
"""The steps of all tools under common names."""
AFTER = ("thaw", "before thaw")
"""Steps that come after the window."""


@dataclass(frozen=True)
class Limit:
    """What the median of a ratio of windows may be at most."""

    load: str
    against: str
    most: float


LIMITS = (
    Limit("idle", "1.15", 0.4),
    Limit("fsync", "1.15", 0.4),
    Limit("sqlite", "1.15", 0.4),
    Limit("buffered", "1.15", 0.1),
    Limit("fsync", "1.11", 0.25),
    Limit("buffered", "1.11", 0.25),
    Limit("sqlite", "1.11", 0.25),
)


def read(paths: Sequence[Path]) -> list[Record]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def select(records: Sequence[Record], load: str, mode: str) -> list[Record]:
    return [r for r in records if r["load"] == load and r["mode"] == mode]


def names(records: Sequence[Record], key: str) -> list[str]:
    """The loads or modes that there are, in a fixed order."""
    present = {r[key] for r in records}
    return [name for name in {"load": LOADS, "mode": (*MODES, OTHER)}[key] if name in present]


def ratios(records: Sequence[Record], load: str, against: str, key: str = "durable") -> list[float]:
    """Of ours to another one, of the same repetition of the same run; with key
    `sender`, to the exit of that one's sender, durable or not."""
    others = {(r["run"], r["turn"]): r for r in select(records, load, against)}
    ours = select(records, load, OURS)
    pairs = [(r, others[r["run"], r["turn"]]) for r in ours if (r["run"], r["turn"]) in others]
    return [ours["durable"] / other[key] for ours, other in pairs]


def parts(record: Record) -> dict[str, float]:
    """Seconds of each of PARTS; what has another name is `other`."""
    known = {name: part for part, members in PARTS.items() for name in members}
    result = dict.fromkeys((*PARTS, "other"), 0.0)
    for name, seconds in record["steps"].items():
        if name not in AFTER:
            result[known.get(name, "other")] += seconds
    return result


def figures(values: Sequence[float], scale: float, digits: int) -> str:
    return Figure.of([value * scale for value in values]).text(digits)


def window_table(records: Sequence[Record], load: str) -> str:
    rows = []
    for mode in names(records, "mode"):
        runs = select(records, load, mode)
        if not runs:
            continue
        median = {part: Figure.of([parts(r)[part] for r in runs]).median for part in PARTS}
        against = ratios(records, load, mode) if mode != OURS else []
        rows.append(
            [
                mode,
                figures([r["durable"] for r in runs], 1e3, 1),
                figures([r["sender"] for r in runs], 1e3, 1),
                " / ".join(f"{1e3 * median[part]:.1f}" for part in PARTS),
                figures([r["frozen_bytes"] for r in runs], 1e-6, 2),
                figures([r["peer_dirty"] for r in runs], 1e-6, 1),
                Figure.of(against).text(3) if against else "",
                str(len(runs)),
            ]
        )
    head = ["", "window, ms", "sender's exit, ms", " / ".join(PARTS)]
    head += ["sent, MB", "target dirty, MB", f"{OURS} / this", "n"]
    rate = Figure.of([r["load_rate"] * 1e-6 for r in records if r["load"] == load])
    return f"{load} ({rate.text(1)} MB/s), median (min..max):\n" + table(head, rows)


def verdicts(records: Sequence[Record]) -> list[tuple[str, bool]]:
    """Each limit that the records can judge."""
    result = []
    for limit in LIMITS:
        values = ratios(records, limit.load, limit.against)
        if values:
            figure = Figure.of(values)
            met = figure.median <= limit.most
            early = Figure.of(ratios(records, limit.load, limit.against, "sender"))
            what = f"{limit.load}: {OURS} / {limit.against}: {figure.text(3)}"
            what += f" (to its sender's exit: {early.median:.3f})"
            result.append((f"{what}, wanted <= {limit.most}: {_met(met)}", met))
    return result


FACTOR, SLACK = 1.5, 0.02
"""A freeze may last so much times its prediction, and so many seconds more."""
KEPT = 0.95
"""The part of the freezes that must not be."""


def prediction_verdicts(records: Sequence[Record]) -> list[tuple[str, bool]]:
    """Predicted against actual, by the sender's own clock; and whether any
    freeze began although its prediction was above --max-freeze."""
    runs = [r for r in records if r.get("predicted") is not None]
    if not runs:
        return []
    kept = sum(r["actual"] <= FACTOR * r["predicted"] + SLACK for r in runs)
    ratio = Figure.of([r["actual"] / r["predicted"] for r in runs])
    met = kept >= KEPT * len(runs)
    line = f"{FACTOR:g} x + {SLACK * 1e3:g} ms"
    words = f"predicted: {kept} of {len(runs)} within {line}, wanted {KEPT:.0%}"
    result = [(f"{words}: {_met(met)}; actual / predicted {ratio.text()}", met)]
    bound = [r for r in runs if r["max_freeze"] is not None]
    if bound:
        above = sum(r["predicted"] > r["max_freeze"] for r in bound)
        words = f"--max-freeze: {above} of {len(bound)} began with a prediction above it"
        result.append((f"{words}: {_met(not above)}", not above))
    return result


def _met(met: bool) -> str:
    return "met" if met else "NOT MET"


def text(records: Sequence[Record]) -> str:
    tables = [window_table(records, load) for load in names(records, "load")]
    judged = [*verdicts(records), *prediction_verdicts(records)]
    return "\n\n".join([*tables, "\n".join(line for line, _ in judged)])


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    p.add_argument("files", type=Path, nargs="+", metavar="FILE")
    p.add_argument("--plots", type=Path, metavar="FOLDER", help="write the plots there, as SVG")
    p.add_argument("--check", action="store_true", help="exit 1 when a limit is not met")
    o = p.parse_args()
    records = read(o.files)
    print(text(records))
    if o.plots:
        import freeze_plots

        freeze_plots.write(records, o.plots)
    return (
        1
        if o.check
        and not all(met for _, met in (*verdicts(records), *prediction_verdicts(records)))
        else 0
    )


if __name__ == "__main__":
    sys.exit(main())
