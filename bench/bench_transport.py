# SPDX-License-Identifier: Apache-2.0
"""Copies between two hosts, against what else copies between them.

    sudo python3 bench/bench_transport.py --repeat 5 --json transport.json

Two hosts in network namespaces, each with an sshd (bench/transport_rig.py), on the CPUs of
this machine.  The source is a loop device in memory, the target a file on the disk of
--dir.  Time is from the start of the command until it has ended, when the target is
durable, with the set-up of all connections.  Groups (--only):

  lan       noise, no limit: pyploop, its pipe through ssh, dd, rsync, nbdcopy over TLS
  far       100 ms and 10 ms, 1 Gb/s: push and pull
  slow      100 Mb/s: --compress auto and never, on noise and on data that halve
  forecast  what `pyploop bench` says of three sources, and what their copies take

Needs root, and what the tests of two hosts need.  Tools that are missing are named.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from common import (
    MIB,
    Figure,
    Requirement,
    Results,
    Sample,
    Samples,
    arguments,
    cleaned_up,
    column,
    finish,
    in_turns,
    noter,
    ratio,
    steady_memory,
    table,
)
from lab import hosts
from transport_rig import Link, Rig, forecast, missing

GROUPS = ("lan", "far", "slow", "forecast")
LAN = Link("LAN")
FAR = (Link("100 ms, 1 Gb/s", 0.1, 1e9), Link("10 ms, 1 Gb/s", 0.01, 1e9))
SLOW = Link("100 Mb/s", 0.0, 1e8)
OURS, NEVER = "pyploop", "pyploop --compress never"
LEAST = {"pyploop | ssh | pyploop": 1.3, "dd | ssh | dd": 1.8, "rsync -W -S": 2.0}
OF_LINE = {FAR[0].name: 0.85, FAR[1].name: 0.90}
OF_NEVER, OF_SLOW = 0.97, 1.8
SIZES = {"lan": 1024, "far": 4096, "slow": 384, "forecast": 1024}
"""MiB."""
Cases = Mapping[str, tuple[str, Callable[[], Sample]]]
"""Name -> the kind of data, and what copies it."""


class Bench:
    def __init__(self, o: argparse.Namespace, results: Results) -> None:
        self._o, self._results = o, results
        self._note = noter(o)

    def run(self, group: str) -> None:
        with contextlib.ExitStack() as stack:
            lab = stack.enter_context(hosts.lab(self._o.dir))
            rig = Rig(lab, stack)
            self._results.settings["rate"] = "TBF" if rig.has_tbf else "line.py"
            getattr(self, f"_{group}")(rig, (self._o.size or SIZES[group]) * MIB)

    def _measure(self, name: str, rig: Rig, link: Link, cases: Cases) -> Samples:
        with rig.over(link):
            bound = {k: partial(rig.case, k, kind, f) for k, (kind, f) in cases.items()}
            samples = self._results.samples[name] = in_turns(bound, self._o.repeat, self._note)
        print(f"\n{name}, median (min..max):\n{report(samples)}", flush=True)
        return samples

    def _require(self, what: str, figure: Figure, least: float) -> None:
        self._results.requirements.append(Requirement(what, figure, least))

    def _lan(self, rig: Rig, size: int) -> None:
        rig.source("noise", size)
        cases = {
            OURS: ("noise", partial(rig.push, "noise")),
            NEVER: ("noise", partial(rig.push, "noise", "--compress", "never")),
            "pyploop | ssh | pyploop": ("noise", partial(rig.pipe, "noise")),
            "dd | ssh | dd": ("noise", partial(rig.dd, "noise")),
            "rsync -W -S": ("noise", partial(rig.rsync, "noise")),
            "nbdcopy, TLS": ("noise", partial(rig.nbdcopy, "noise")),
        }
        for name in list(cases):
            if why := missing(name.split()[0].strip(",")):
                print(f"Left out: {name}, which {why}")
                del cases[name]
        samples = self._measure(f"{size // MIB} MiB of noise, {LAN.name}", rig, LAN, cases)
        ours = column(samples[OURS], "mb_per_s")
        for name, least in LEAST.items():
            if name in samples:
                figure = ratio(ours, column(samples[name], "mb_per_s"))
                self._require(f"{LAN.name}: {OURS} / {name}", figure, least)
        figure = ratio(ours, column(samples[NEVER], "mb_per_s"))
        self._require(f"{LAN.name}, noise: auto / never", figure, OF_NEVER)

    def _far(self, rig: Rig, size: int) -> None:
        rig.source("noise", size)
        for link in FAR:
            cases = {
                "push": ("noise", partial(rig.push, "noise")),
                "pull": ("noise", partial(rig.pull, "noise")),
            }
            samples = self._measure(f"{size // MIB} MiB of noise, {link.name}", rig, link, cases)
            for way in cases:
                for key, what in (("of_line", "all"), ("first_of_line", "first pass")):
                    figure = Figure.of(column(samples[way], key))
                    self._require(f"{link.name}: {way}, {what}", figure, OF_LINE[link.name])

    def _slow(self, rig: Rig, size: int) -> None:
        cases = {}
        for kind in ("noise", "2:1"):
            rig.source(kind, size)
            for how in ("never", "auto"):
                cases[f"{kind}, {how}"] = (kind, partial(rig.push, kind, "--compress", how))
        samples = self._measure(f"{size // MIB} MiB, {SLOW.name}", rig, SLOW, cases)
        fast = [v * 1e6 / SLOW.bytes_per_s for v in column(samples["2:1, auto"], "first_mb_per_s")]
        self._require(f"{SLOW.name}, 2:1: data / the line, first pass", Figure.of(fast), OF_SLOW)
        auto, never = (column(samples[f"noise, {how}"], "mb_per_s") for how in ("auto", "never"))
        self._require(f"{SLOW.name}, noise: auto / never", ratio(auto, never), OF_NEVER)

    def _forecast(self, rig: Rig, size: int) -> None:
        rows: list[Sequence[str]] = []
        for link in (LAN, SLOW):
            for kind in ("noise", "2:1", "sparse"):
                if kind not in rig.sizes:
                    rig.source(kind, size)
                with rig.over(link):
                    said = [forecast(rig, kind) for _ in range(self._o.repeat)]
                    name = f"{kind}, {link.name}"
                    took = [
                        rig.case(name, kind, partial(rig.push, kind)) for _ in range(self._o.repeat)
                    ]
                for one, expected in zip(took, said, strict=True):
                    one["forecast"] = expected["seconds"]
                    one["limit"] = expected["limit"]
                    self._note(f"forecast {name}: {one}")
                self._results.samples.setdefault("forecast", {})[name] = took
                both = ratio(column(took, "forecast"), column(took, "seconds"))
                without = ratio(column(took, "forecast"), column(took, "first_pass"))
                seconds = Figure.of(column(took, "seconds")).text()
                rows.append([name, said[0]["limit"], seconds, both.text(), without.text()])
        head = ["source, line", "what limits it", "seconds", "forecast / all", "/ first pass"]
        print("\nforecast, median (min..max):\n" + table(head, rows), flush=True)


def report(samples: Samples) -> str:
    """One group's table."""
    ours = next(iter(samples.values()))
    rows = []
    for name, runs in samples.items():
        first, line = column(runs, "first_pass"), column(runs, "of_line")
        rows.append(
            [
                name,
                Figure.of(column(runs, "seconds")).text(),
                Figure.of(column(runs, "mb_per_s")).text(0),
                Figure.of(first).text() if first else "",
                Figure.of(line).text() if line else "",
                Figure.of(column(runs, "first_of_line")).text() if line else "",
                Figure.of(column(runs, "wire_share")).text() if first else "",
                Figure.of(column(runs, "streams")).text(0) if first else "",
                Figure.of(column(runs, "cpu_per_gib")).text(),
                ratio(column(ours, "mb_per_s"), column(runs, "mb_per_s")).text(),
            ]
        )
    head = [
        "", "seconds", "MB/s", "first pass, s", "of the line", "first pass", "wire/data",
        "streams", "CPU s/GiB", "the first / this",
    ]  # fmt: skip
    return table(head, rows)


def main() -> int:
    p = arguments(__doc__, repeat=5)
    add = p.add_argument
    add("--size", type=int, metavar="MIB", help=f"of the source (by group: {SIZES})")
    add("--only", default=",".join(GROUPS), help="of %(default)s")
    add("--dir", type=Path, default=Path("/var/tmp"), help="on the target's disk (%(default)s)")
    o = p.parse_args()
    groups = o.only.split(",")
    if unknown := set(groups) - set(GROUPS):
        raise SystemExit(f"--only: no {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    results = Results(settings={k: str(v) for k, v in vars(o).items()})
    with cleaned_up() as stack:
        results.settings["memory"] = stack.enter_context(steady_memory())
        print(f"Memory: {results.settings['memory']}")
        bench = Bench(o, results)
        for group in groups:
            bench.run(group)
    return finish(results, o)


if __name__ == "__main__":
    sys.exit(main())
