# SPDX-License-Identifier: Apache-2.0
"""Tables of bench_migrate.py's samples.

python3 bench/migrate_report.py migrate.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import forecast_report
import numpy as np
from common import Figure, Sample, column, table

ROWS = (
    "Suspend + Dump",
    "Pcopy after suspend",
    "Copy dump file",
    "Undump + Resume",
    "Total suspended time",
)
RATIO = 0.15
"""Of the averages, at most."""
DISK = 0.10
"""Of the suspended time when idle, at most."""

Loads = Mapping[str, Mapping[str, Sequence[Sample]]]


def _times(kind: str, samples: Sequence[Sample]) -> str:
    """The table that vzmigrate's authors published: iterations, average."""
    head = [f"{kind} (seconds)", *(str(i + 1) for i in range(len(samples))), "AVG"]
    rows = []
    for name in ROWS:
        values = [float(s["rows"][name]) for s in samples]
        rows.append([name, *(f"{v:.2f}" for v in values), f"{np.mean(values):.3f}"])
    return table(head, rows)


def _mean(samples: Sequence[Sample], key: str) -> float:
    return float(np.mean(column(samples, key)))


def ratio(kinds: Mapping[str, Sequence[Sample]]) -> float:
    """Average suspended time, pyploop over naive."""
    return _mean(kinds["pyploop"], "total") / _mean(kinds["naive"], "total")


def disk_part(samples: Sequence[Sample]) -> float:
    """What part of the suspended time would not be there without the disk."""
    return _mean(samples, "disk_beyond") / _mean(samples, "total")


def _verdict(ok: bool) -> str:
    return "met" if ok else "NOT MET"


def report(loads: Loads) -> str:
    parts = []
    for load, kinds in loads.items():
        what = "Idle" if load == "0" else f"With {load} MB/s of random writes"
        ours, part = kinds["pyploop"], disk_part(kinds["pyploop"])
        reached = ratio(kinds)
        disk = f"The disk's part of ours: the target waited for it {part:.1%} of the suspended time"
        if load == "0":
            disk += f", required <= {DISK:.0%}: {_verdict(part <= DISK)}"
        gaps = [
            [
                kind,
                *(
                    Figure.of(column(samples, key)).text(3)
                    for key in ("total", "application_gap", "client_gap")
                ),
            ]
            for kind, samples in kinds.items()
        ]
        frozen = Figure.of(column(ours, "disk_frozen")).text(3)
        sent = Figure.of([x / 1024 for x in column(ours, "disk_sent")]).text(0)
        parts += [
            f"### {what}",
            *(_times(kind, samples) for kind, samples in kinds.items()),
            f"Ratio of averages: {reached:.3f}, required <= {RATIO}: {_verdict(reached <= RATIO)}.",
            f"{disk}. The disk's own frozen time, beside the dump: {frozen} s, {sent} KiB sent.",
            forecast_report.line(ours),
            table(
                ["median (range), s", "suspended", "longest gap between two fsyncs", "client's"],
                gaps,
            ),
        ]
    return "\n\n".join(parts)


def main() -> int:
    document = json.loads(Path(sys.argv[1]).read_text())
    print(report(document["samples"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
