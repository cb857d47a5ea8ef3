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
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Results, Sample, cleaned_up

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

import forecast_report  # noqa: E402
import memory_bench  # noqa: E402
import migrate_report  # noqa: E402
from lab import container, hosts, verify  # noqa: E402

SETTLE = 1.0
"""Seconds between migrations, in which the load dirties the disk."""
_ROW = re.compile(r"^ +([A-Z][\w +]+): +(\d+\.\d\d)$", re.MULTILINE)


@dataclass
class Bench:
    """The container and where it is."""

    lab: hosts.Lab
    client: verify.Client
    here: hosts.Host

    def migrate(self, kind: str) -> Sample:
        """Move it to the other host; what was measured, in seconds."""
        other = self.lab.other(self.here)
        container.clear_bundle(other)
        container.write_bundle(self.here)
        time.sleep(SETTLE)
        self.client.mark()
        began = time.time_ns()
        sample = self._naive(other) if kind == "naive" else self._pyploop(other)
        self.here = other
        # One acknowledged write after the move, so that the gap is over.
        self.client.verify_database()
        sample["client_gap"] = self.client.mark()["gap"]
        self.client.verify_blocks()
        log = verify.check_append_log(other.outside(container.ROOTFS))
        sample["application_gap"] = log.gap(began)
        return sample

    def _naive(self, other: hosts.Host) -> Sample:
        container.write_bundle(other)
        script = ("env", f"PYTHONPATH={TESTS}", sys.executable, TESTS / "lab/naive.py")
        steps = json.loads(self.here.run(*script, other.name, timeout=120))
        return {
            "rows": {
                "Suspend + Dump": steps["suspend_dump"] + steps["umount"],
                "Pcopy after suspend": steps["copy_disk"],
                "Copy dump file": steps["copy_dump"],
                "Undump + Resume": steps["mount"] + steps["restore"],
                "Total suspended time": steps["total"],
            },
            "steps": steps,
            "total": steps["total"],
        }

    def _pyploop(self, other: hosts.Host) -> Sample:
        events = self.lab.folder / "events"
        options = ["--live", "-t", "--config", container.PYPLOOP_CONFIG, "--json", events]
        command = ["pyploop", "migrate", *options, other.name, container.NAME]
        out = self.here.run(*command, timeout=120)
        rows = {name: float(value) for name, value in _ROW.findall(out)}
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        (steps,) = (e["steps"] for e in lines if e["event"] == "moved")
        (frozen,) = (e for e in lines if e["event"] == "frozen")
        return {
            "rows": rows,
            "steps": steps,
            "total": steps["total"],
            "disk_frozen": frozen["total"],
            "disk_sent": frozen["sent"],
            # The disk's part: by how much it kept a target waiting that had the dump.
            "disk_beyond": steps["disks waited for"],
            **forecast_report.forecast_of(lines),
        }


def measure(o: argparse.Namespace, load: int) -> dict[str, list[Sample]]:
    """Each kind once per iteration, in turns, in a lab of its own; the first
    iteration warms caches and is not counted."""
    samples: dict[str, list[Sample]] = {"naive": [], "pyploop": []}
    with hosts.lab(o.dir) as lab, container.container(lab), verify.client(lab) as client:
        bench = Bench(lab, client, lab.a)
        client.load(load)
        for turn in range(o.iterations + 1):
            kinds = list(samples)[:: -1 if turn % 2 else 1]
            for kind in kinds:
                sample = bench.migrate(kind)
                print(f"load {load} MB/s, {turn}: {kind}: {sample}", file=sys.stderr, flush=True)
                if turn:
                    samples[kind].append(sample)
        container.remove(bench.here)
        verify.check_database(bench.here.outside(container.ROOTFS), client.ledger, lab.folder)
    return samples


def _memory(o: argparse.Namespace, document: Results) -> int:
    with cleaned_up():
        for size in o.memory.split(","):
            bytes_ = int(size) << 20
            document.samples[size] = memory_bench.measure(o.dir, bytes_, o.iterations, o.base)
            if o.json:
                document.write(o.json)
    text = memory_bench.report(document.samples)
    print(text)
    if o.report:
        o.report.write_text(text + "\n")
    return 0


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = p.add_argument
    add("--iterations", type=int, default=6, metavar="N", help="of each kind (6)")
    add("--loads", default="0,20", help="MB of random writes a second, 0 is idle (%(default)s)")
    add(
        "--memory",
        metavar="MIB,…",
        help="instead: containers with so much memory, ours in turns with ssh cat of the images",
    )
    add("--base", type=Path, metavar="PYTHON", help="with --memory, and another checkout's pyploop")
    add("--dir", type=Path, default=Path("/var/tmp"), help="where the hosts' disks lie")
    add("--json", type=Path, metavar="FILE", help="all samples")
    add("--report", type=Path, metavar="FILE", help="the tables, as Markdown")
    o = p.parse_args()
    if os.geteuid() != 0:
        p.error("needs root")
    results: dict[str, Any] = {}
    document = Results(samples=results)
    document.settings = {"iterations": o.iterations, "image_bytes": container.IMAGE_BYTES}
    if o.memory:
        return _memory(o, document)
    with cleaned_up():
        for load in (int(x) for x in o.loads.split(",")):
            results[str(load)] = measure(o, load)
            if o.json:
                document.write(o.json)
    text = migrate_report.report(results)
    print(text)
    if o.report:
        o.report.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
