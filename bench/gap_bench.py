# SPDX-License-Identifier: Apache-2.0
"""The part of bench_migrate.py about the client: by how much its longest gap is longer than
the suspended time, and how well that was forecast, over many moves to and fro."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import forecast_report
import numpy as np
from common import Sample, Samples, column
from lab import container, hosts, verify
from lab.pipes import large_pipes
from moves import Moves


def measure(folder: Path, memory: int, count: int, options: Sequence[str]) -> Samples:
    """memory: bytes; 0: little.  options: of `pyploop migrate`."""
    with (
        large_pipes(),  # for --post-copy
        hosts.lab(folder) as lab,
        container.container(lab, memory=memory),
        verify.client(lab) as client,
    ):
        moves = Moves(lab, client, lab.a, memory)
        samples = []
        for turn in range(count):
            sample = moves.pyploop(*options)
            samples.append(sample)
            beyond = sample["client_gap"] - sample["total"]
            print(f"{turn}: {sample['total']:.3f}, {beyond:+.4f}", file=sys.stderr, flush=True)
        container.remove(moves.here)
        verify.check_database(moves.here.outside(container.ROOTFS), client.ledger, lab.folder)
    return {"pyploop": samples}


def report(samples: Sequence[Sample], memory: int) -> str:
    """memory: bytes."""
    totals = np.asarray(column(samples, "total"))
    beyond = np.asarray(column(samples, "client_gap")) - totals
    low, middle, high, p99 = np.percentile(beyond * 1000, [0, 50, 90, 99])
    return (
        f"{len(samples)} moves, {memory >> 20} MiB of memory: suspended {np.median(totals):.3f} "
        f"({totals.min():.3f}..{totals.max():.3f}) s. The client's longest gap minus the suspended "
        f"time: median {middle:.1f} ms, 90 % within {high:.1f} ms, 99 % within {p99:.1f} ms, "
        f"{low:.1f}..{beyond.max() * 1000:.1f} ms. {forecast_report.line(samples)}"
    )
