# SPDX-License-Identifier: Apache-2.0
"""The suspended time of a live migration, of a script's steps and of ours.

    sudo python3 bench/bench_migrate.py --json migrate.json --report migrate.md

In the lab of the tests (tests/lab): two hosts, one container, one client.  The
script (tests/lab/naive.py: a fresh ssh, scp or rsync per step) and `pyploop
migrate` move the same container in turns, first idle (its server writes and its
appender fsyncs), then also with random writes.  Needs what the tests need.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import gap_bench
import memory_bench
import migrate_report
from common import Results, Samples, cleaned_up, in_turns
from lab import container, hosts, verify
from moves import NAIVE, Moves


def measure(o: argparse.Namespace, load: int) -> Samples:
    """Each kind once per iteration, in turns, in a lab of its own; the first
    iteration warms caches and is not counted."""
    with hosts.lab(o.dir) as lab, container.container(lab), verify.client(lab) as client:
        moves = Moves(lab, client, lab.a)
        client.load(load)
        samples = in_turns(
            {NAIVE: moves.naive, "pyploop": moves.pyploop},
            o.iterations,
            lambda text: print(f"load {load} MB/s, {text}", file=sys.stderr, flush=True),
        )
        container.remove(moves.here)
        verify.check_database(moves.here.outside(container.ROOTFS), client.ledger, lab.folder)
    return samples


def _memory(o: argparse.Namespace, document: Results) -> int:
    with cleaned_up():
        for size in o.memory.split(","):
            bytes_ = int(size) << 20
            document.samples[size] = memory_bench.measure(o.dir, bytes_, o.iterations, o.base)
            if o.json:
                document.write(o.json)
    _say(memory_bench.report(document.samples), o)
    return 0


def _moves(o: argparse.Namespace, document: Results) -> int:
    memory = int(o.memory or 0) << 20
    with cleaned_up():
        samples = gap_bench.measure(o.dir, memory, o.moves, o.options.split())
    document.samples = {str(memory >> 20): samples}
    if o.json:
        document.write(o.json)
    _say(gap_bench.report(samples["pyploop"], memory), o)
    return 0


def _say(text: str, o: argparse.Namespace) -> None:
    print(text)
    if o.report:
        o.report.write_text(text + "\n")


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = p.add_argument
    add("--iterations", type=int, default=6, metavar="N", help="of each kind (6)")
    add("--loads", default="0,20", help="MB of random writes a second, 0 is idle (%(default)s)")
    add(
        "--memory",
        metavar="MIB,…",
        help="instead: containers with so much memory, in turns by the script, by ours, by ours "
        "with post-copy, and ssh cat of the images",
    )
    add("--base", type=Path, metavar="PYTHON", help="with --memory, and another checkout's pyploop")
    add(
        "--moves",
        type=int,
        metavar="N",
        help="instead: N moves by ours, with the client's gap and the forecast; --memory: of one",
    )
    add("--options", default="", help="with --moves: of pyploop migrate")
    add("--dir", type=Path, default=Path("/var/tmp"), help="where the hosts' disks lie")
    add("--json", type=Path, metavar="FILE", help="all samples")
    add("--report", type=Path, metavar="FILE", help="the tables, as Markdown")
    o = p.parse_args()
    if os.geteuid() != 0:
        p.error("needs root")
    results: dict[str, Any] = {}
    document = Results(samples=results)
    document.settings = {"iterations": o.iterations, "image_bytes": container.IMAGE_BYTES}
    if o.moves:
        return _moves(o, document)
    if o.memory:
        return _memory(o, document)
    with cleaned_up():
        for load in (int(x) for x in o.loads.split(",")):
            results[str(load)] = measure(o, load)
            if o.json:
                document.write(o.json)
    _say(migrate_report.report(results), o)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
