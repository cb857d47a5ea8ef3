# SPDX-License-Identifier: Apache-2.0
"""Moves of the lab's container from one host to the other, and what each took."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forecast_report
from common import TESTS, Sample
from lab import container, hosts, verify

SETTLE = 1.0
"""Seconds between two moves, in which the load dirties the disk."""
LONGEST = 300.0
"""Seconds of one move, at most."""
NAIVE = "naive"
SENT = "Copy dump file"
BASE_CONFIG = "/srv/pyploop-base.toml"
_ROW = re.compile(r"^ +([A-Z][\w +]+): +(\d+\.\d\d)$", re.MULTILINE)


@dataclass
class Moves:
    """The container, where it is, and how much memory it has (bytes; 0: little)."""

    lab: hosts.Lab
    client: verify.Client
    here: hosts.Host
    memory: int = 0

    def naive(self) -> Sample:
        """By the script of naive steps."""
        other, began = self._begin()
        container.write_bundle(other, memory=self.memory)
        script = ("env", f"PYTHONPATH={TESTS}", sys.executable, TESTS / "lab/naive.py")
        steps = json.loads(self.here.run(*script, other.name, timeout=LONGEST))
        sample: Sample = {
            "rows": {
                "Suspend + Dump": steps["suspend_dump"] + steps["umount"],
                "Pcopy after suspend": steps["copy_disk"],
                SENT: steps["copy_dump"],
                "Undump + Resume": steps["mount"] + steps["restore"],
                "Total suspended time": steps["total"],
            },
            "steps": steps,
            "total": steps["total"],
        }
        return sample | self._end(other, began)

    def pyploop(self, *options: str, base: bool = False) -> Sample:
        """By `pyploop migrate --live`.  base: by the other checkout's (install_base)."""
        other, began = self._begin()
        events = self.lab.folder / "events"
        program, config = "pyploop", container.PYPLOOP_CONFIG
        if base:
            program, config = "pyploop-base", BASE_CONFIG
        words = [program, "migrate", "--live", "-t", "--config", config, "--json", events]
        out = self.here.run(*words, *options, other.name, container.NAME, timeout=LONGEST)
        lines = [json.loads(line) for line in events.read_text().splitlines()]
        (steps,) = (e["steps"] for e in lines if e["event"] == "moved")
        (frozen,) = (e for e in lines if e["event"] == "frozen")
        rows = {name: float(value) for name, value in _ROW.findall(out)}
        # With all digits: what was sent after the dump, or after the disks' last blocks.
        rows[SENT] = max(steps["dump sent"] - max(steps["dump"], steps["disks"]), 0.0)
        sample: dict[str, Any] = {
            "rows": rows,
            "steps": steps,
            "total": steps["total"],
            "disk_frozen": frozen["total"],
            "disk_sent": frozen["sent"],
            # The disk's part: by how much it kept a target waiting that had the dump.
            "disk_beyond": steps["disks waited for"],
        }
        return sample | forecast_report.forecast_of(lines) | self._end(other, began)

    def _begin(self) -> tuple[hosts.Host, int]:
        other = self.lab.other(self.here)
        container.clear_bundle(other)
        container.write_bundle(self.here, memory=self.memory)
        time.sleep(SETTLE)
        self.client.mark()
        return other, time.time_ns()

    def _end(self, other: hosts.Host, began: int) -> Sample:
        self.here = other
        # One acknowledged write after the move, so that the gap is over.
        self.client.verify_database()
        gap = self.client.mark()["gap"]
        self.client.verify_blocks()
        log = verify.check_append_log(other.outside(container.ROOTFS))
        return {"client_gap": gap, "application_gap": log.gap(began)}


def install_base(host: hosts.Host, python: Path) -> None:
    """Another checkout's pyploop, by its Python, as `pyploop-base`."""
    program = host.folder / "bin/pyploop-base"
    program.write_text(f'#!/bin/sh\nexec {python} -P -m pyploop.cli.main "$@"\n')
    program.chmod(0o755)
    text = host.outside(container.PYPLOOP_CONFIG).read_text()
    text = text.replace('"pyploop"', '"pyploop-base"').replace(
        container.PYPLOOP_CONFIG, BASE_CONFIG
    )
    host.outside(BASE_CONFIG).write_text(text)
