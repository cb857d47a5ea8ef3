# SPDX-License-Identifier: Apache-2.0
"""The part of bench_migrate.py about memory: how the suspended time grows with it.

A container with so much private memory (random, a part of it rewritten slowly) is
moved by `pyploop migrate`, by that of another checkout (`--base`), and its dump is sent
by `ssh -c aes128-gcm@openssh.com HOST 'cat > /dev/shm/x'`, in turns, in one lab.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forecast_report
from common import Figure, Sample, column, table
from lab import container, hosts, verify

MIB = 1 << 20
SETTLE = 1.0
"""Seconds between two migrations."""
CIPHER = "aes128-gcm@openssh.com"
DUMP, COPY = "/dev/shm/bench-dump", "/dev/shm/bench-copy"
BASE_CONFIG = "/srv/pyploop-base.toml"
_ROW = re.compile(r"^ +([A-Z][\w +]+): +(\d+\.\d\d)$", re.MULTILINE)
_SENT = "Copy dump file"
COLUMNS = ("Suspend + Dump", "Pcopy after suspend", _SENT, "Undump + Resume")


@dataclass
class MemoryBench:
    """The container, where it is, and how much memory it has."""

    lab: hosts.Lab
    client: verify.Client
    here: hosts.Host
    memory: int

    def take(self, kind: str) -> Sample:
        time.sleep(SETTLE)
        return self._cat() if kind == "ssh cat" else self._move(kind)

    def _move(self, kind: str) -> Sample:
        other = self.lab.other(self.here)
        container.clear_bundle(other)
        container.write_bundle(self.here, memory=self.memory)
        self.client.mark()
        events = self.lab.folder / "events"
        program, config = "pyploop", container.PYPLOOP_CONFIG
        if kind == "base":
            program, config = "pyploop-base", BASE_CONFIG
        words = [program, "migrate", "--live", "-t", "--config", config, "--json", events]
        out = self.here.run(*words, other.name, container.NAME, timeout=300)
        self.here = other
        self.client.verify_database()
        gap = self.client.mark()["gap"]
        self.client.verify_blocks()
        lines = [json.loads(text) for text in events.read_text().splitlines()]
        (steps,) = (e["steps"] for e in lines if e["event"] == "moved")
        rows = {name: float(value) for name, value in _ROW.findall(out)}
        # With all digits: what was sent after the dump, or after the disks' last blocks.
        rows[_SENT] = max(steps["dump sent"] - max(steps["dump"], steps["disks"]), 0.0)
        sample = {"rows": rows, "steps": steps, "total": steps["total"], "client_gap": gap}
        return sample | forecast_report.forecast_of(lines)

    def _cat(self) -> Sample:
        """The images of a dump of the container as it is now, one after the other."""
        here, other = self.here, self.lab.other(self.here)
        flags = f"--image-path {DUMP} --work-path {DUMP}-work --tcp-established --file-locks"
        try:
            here.run("mkdir", DUMP, f"{DUMP}-work")
            dump = f"runc checkpoint --leave-running {flags} {container.NAME}"
            here.run("sh", "-c", dump, timeout=120)
            start = time.monotonic()
            here.run("ssh", "-c", CIPHER, other.name, "true")
            connected = time.monotonic() - start
            line = f"cat {DUMP}/* | ssh -c {CIPHER} {other.name} 'cat > {COPY}'"
            start = time.monotonic()
            here.run("sh", "-c", line, timeout=300)
            took = time.monotonic() - start
            size = int(other.run("stat", "-c", "%s", COPY))
        finally:
            here.run("rm", "-rf", DUMP, f"{DUMP}-work")
            other.run("rm", "-f", COPY)
        return {"seconds": took, "connect": connected, "bytes": size}


def measure(
    folder: Path, memory: int, iterations: int, base: Path | None
) -> dict[str, list[Sample]]:
    """Each kind once per turn; the first turn warms up and is not counted.  base: the
    other checkout's Python."""
    kinds = ["pyploop", "ssh cat", *(["base"] if base else [])]
    samples: dict[str, list[Sample]] = {kind: [] for kind in kinds}
    with (
        hosts.lab(folder) as lab,
        container.container(lab, memory=memory),
        verify.client(lab) as client,
    ):
        for host in (lab.a, lab.b):
            _install_base(host, base)
        bench = MemoryBench(lab, client, lab.a, memory)
        for turn in range(iterations + 1):
            for kind in kinds[:: -1 if turn % 2 else 1]:
                sample = bench.take(kind)
                print(f"{memory // MIB} MiB, {turn}: {kind}: {sample}", file=sys.stderr, flush=True)
                if turn:
                    samples[kind].append(sample)
        container.remove(bench.here)
    return samples


def _install_base(host: hosts.Host, base: Path | None) -> None:
    if base is None:
        return
    program = host.folder / "bin/pyploop-base"
    program.write_text(f'#!/bin/sh\nexec {base} -P -m pyploop.cli.main "$@"\n')
    program.chmod(0o755)
    text = host.outside(container.PYPLOOP_CONFIG).read_text()
    text = text.replace('"pyploop"', '"pyploop-base"').replace(
        container.PYPLOOP_CONFIG, BASE_CONFIG
    )
    host.outside(BASE_CONFIG).write_text(text)


def report(sizes: Mapping[str, Mapping[str, Sequence[Sample]]]) -> str:
    """For each size: the rows of each kind, and the ratio to ssh cat."""
    parts = []
    for memory, kinds in sizes.items():
        rows: list[list[Any]] = []
        for kind, samples in kinds.items():
            if kind == "ssh cat":
                continue
            values = [[s["rows"][name] for s in samples] for name in COLUMNS]
            values += [column(samples, "total"), column(samples, "client_gap")]
            rows.append([kind, *(Figure.of(v).text(2) for v in values)])
        cat = column(kinds["ssh cat"], "seconds")
        net = [s["seconds"] - s["connect"] for s in kinds["ssh cat"]]
        sent = [s["rows"][_SENT] for s in kinds["pyploop"]]
        each = [ours / its for ours, its in zip(sent, cat, strict=True)]
        bare = [ours / its for ours, its in zip(sent, net, strict=True)]
        parts += [
            f"### {memory} MiB of memory",
            table(
                ["median (range), s", *COLUMNS, "suspended", "client's longest gap"],
                rows,
            ),
            f"`ssh -c {CIPHER} HOST 'cat > /dev/shm/x'` of the same images: "
            f"{Figure.of(cat).text(2)} s, {Figure.of(net).text(2)} s of it without the connection's"
            f" beginning. {_SENT}, as a part of it, turn by turn: {Figure.of(each).text(2)}"
            f" ({Figure.of(bare).text(2)}).",
            forecast_report.line(kinds["pyploop"]),
        ]
    return "\n\n".join(parts)
