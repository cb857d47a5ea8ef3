# SPDX-License-Identifier: Apache-2.0
"""What --compress brings on a slow line, and what it costs where there is none.

    python3 bench/bench_compress.py --repeat 5 --json compress.json

A file that is cached, and two kinds of data: blocks of which one half is zeroes (2:1),
and noise.  Sender and receiver run on this machine, the stream goes through a pipe, or
through a relay that lets so many bytes per second pass.  All cases run in turns.  Needs
no root.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import (
    MIB,
    SHM,
    Figure,
    Requirement,
    Results,
    Sample,
    Samples,
    Step,
    arguments,
    cleaned_up,
    column,
    finish,
    folder,
    in_turns,
    installed,
    noter,
    random_file,
    ratio,
    run,
    table,
)

LINE = 12_500_000
"""Bytes per second: 100 Mbit/s."""
CATCH_UP = 0.25
"""Seconds that a relay may be late, when the CPUs are busy, and still keep its rate."""
PART = 16384


def relay(rate: float) -> None:
    """stdin to stdout, so many bytes per second."""
    due = time.monotonic()
    while part := os.read(0, PART):
        due = max(due, time.monotonic() - CATCH_UP) + len(part) / rate
        time.sleep(max(due - time.monotonic(), 0))
        while part:
            part = part[os.write(1, part) :]


@dataclass
class Bench:
    scratch: Path
    size: int
    pyploop: Sequence[str]

    def __post_init__(self) -> None:
        self.env = installed(self.scratch)
        self.summary, self.target = self.scratch / "summary", self.scratch / "target"
        self.sources = {kind: self.scratch / kind for kind in ("noise", "2:1")}
        random_file(self.sources["noise"], self.size)
        with self.sources["noise"].open("rb") as noise, self.sources["2:1"].open("wb") as half:
            while block := noise.read(4096):
                half.write(block[:2048] + bytes(2048))

    def case(self, kind: str, slow: bool, compress: str) -> Sample:
        source = self.sources[kind]
        self.target.unlink(missing_ok=True)
        out_r, out_w = os.pipe()
        back_r, back_w = os.pipe()
        ours = [out_r, out_w, back_r, back_w]
        send = [*self.pyploop, "-v-1", "copy", "-s", str(source), "-f", str(back_r)]
        send += ["--json", str(self.summary), "--compress", compress]
        steps = [Step(send, env=self.env, stdout=out_w, fds=[back_r])]
        if slow:
            in_r, in_w = os.pipe()
            ours += [in_r, in_w]
            command = [sys.executable, __file__, "--relay", str(LINE)]
            steps.append(Step(command, stdin=out_r, stdout=in_w))
            out_r = in_r
        receive = [*self.pyploop, "-v-1", "copy", "-d", str(self.target), "-f", str(back_w)]
        steps.append(Step(receive, env=self.env, stdin=out_r, fds=[back_w]))
        usage = run(steps, self.scratch / "messages", ours)
        subprocess.run(["cmp", str(source), str(self.target)], check=True)
        events = map(json.loads, self.summary.read_text().splitlines())
        summary = next(e for e in events if e["event"] == "summary")
        return {
            "seconds": usage.seconds,
            "cpu": usage.user[0] + usage.system[0] + usage.user[-1] + usage.system[-1],
            "first_pass": summary["first_pass"],
            "mb_per_s": self.size / summary["first_pass"] / 1e6,
            "wire_share": summary["wire_bytes"] / summary["data_bytes"],
        }


def report(samples: Samples) -> str:
    rows = []
    for name, runs in samples.items():
        rows.append(
            [
                name,
                Figure.of(column(runs, "first_pass")).text(),
                Figure.of(column(runs, "mb_per_s")).text(1),
                Figure.of(column(runs, "wire_share")).text(),
                Figure.of(column(runs, "cpu")).text(),
            ]
        )
    head = ["data, line, --compress", "first pass, s", "MB/s of data", "wire/data", "CPU s"]
    return table(head, rows)


def requirements(samples: Samples) -> list[Requirement]:
    def rates(kind: str, line: str, compress: str) -> list[float]:
        return column(samples[f"{kind}, {line}, {compress}"], "mb_per_s")

    def against(line: str) -> Figure:
        return ratio(rates("noise", line, "auto"), rates("noise", line, "never"))

    fast = [rate / (LINE / 1e6) for rate in rates("2:1", "slow", "auto")]
    return [
        Requirement("2:1, slow: auto / the line", Figure.of(fast), 1.8),
        Requirement("noise, slow: auto / never", against("slow"), 0.97),
        Requirement("noise, fast: auto / never", against("fast"), 0.97),
    ]


def options() -> argparse.Namespace:
    p = arguments(__doc__, repeat=5)
    add = p.add_argument
    add("--size", type=int, default=192, metavar="MIB", help="of the source (192)")
    add("--only", choices=("slow", "fast"), help="one of the lines")
    add("--pyploop", type=shlex.split, default=[sys.executable, "-m", "pyploop.cli.main"])
    add("--relay", type=float, metavar="RATE", help=argparse.SUPPRESS)
    return p.parse_args()


def main() -> int:
    o = options()
    if o.relay:
        relay(o.relay)
        return 0
    results = Results(settings={k: str(v) for k, v in vars(o).items()})
    with cleaned_up() as stack:
        scratch = stack.enter_context(folder(SHM / f"bench-compress-{os.getpid()}"))
        bench = Bench(scratch, o.size * MIB, o.pyploop)
        cases: dict[str, Callable[[], Sample]] = {}
        for kind in bench.sources:
            for line in ("slow", "fast") if o.only is None else (o.only,):
                for compress in ("never", "auto", "zstd:1"):
                    cases[f"{kind}, {line}, {compress}"] = partial(
                        bench.case, kind, line == "slow", compress
                    )
        samples = results.samples["compress"] = in_turns(cases, o.repeat, noter(o))
        print(report(samples))
        if o.only is None:
            results.requirements = requirements(samples)
    return finish(results, o)


if __name__ == "__main__":
    sys.exit(main())
