# SPDX-License-Identifier: Apache-2.0
"""The part of bench_migrate.py about memory: how the suspended time grows with it.

A container with so much private memory (random, a part of it rewritten slowly) is moved
by the naive script, by `pyploop migrate`, by that with post-copy, and by that of another
checkout (`--base`); and its dump is sent by
`ssh -c aes128-gcm@openssh.com HOST 'cat > /dev/shm/x'`.  In turns, in one lab.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import forecast_report
from common import Figure, Sample, Samples, column, in_turns, ratio, table
from lab import container, hosts, verify
from lab.pipes import large_pipes
from moves import NAIVE, SENT, Moves, install_base

MIB = 1 << 20
OURS, POST_COPY, BASE, CAT = "pyploop", "pyploop, post-copy", "base", "ssh cat"
CIPHER = "aes128-gcm@openssh.com"
DUMP, COPY = "/dev/shm/bench-dump", "/dev/shm/bench-copy"
COLUMNS = ("Suspend + Dump", "Pcopy after suspend", SENT, "Undump + Resume")


def _cat(moves: Moves) -> Sample:
    """The images of a dump of the container as it is now, one after the other."""
    here, other = moves.here, moves.lab.other(moves.here)
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


def measure(folder: Path, memory: int, iterations: int, base: Path | None) -> Samples:
    """Each kind once per turn; the first turn warms up and is not counted.  base: the
    other checkout's Python."""
    with (
        large_pipes(),
        hosts.lab(folder) as lab,
        container.container(lab, memory=memory),
        verify.client(lab) as client,
    ):
        moves = Moves(lab, client, lab.a, memory)
        cases: dict[str, Callable[[], Sample]] = {
            NAIVE: moves.naive,
            OURS: moves.pyploop,
            POST_COPY: lambda: moves.pyploop("--post-copy", "always"),
            CAT: lambda: _cat(moves),
        }
        if base:
            for host in (lab.a, lab.b):
                install_base(host, base)
            cases[BASE] = lambda: moves.pyploop(base=True)
        samples = in_turns(
            cases,
            iterations,
            lambda text: print(f"{memory // MIB} MiB, {text}", file=sys.stderr, flush=True),
        )
        container.remove(moves.here)
    return samples


def report(sizes: Mapping[str, Mapping[str, Sequence[Sample]]]) -> str:
    """For each size: the rows of each kind, and the ratios."""
    parts = []
    for memory, kinds in sizes.items():
        rows: list[list[Any]] = []
        for kind, samples in kinds.items():
            if kind == CAT:
                continue
            values = [[s["rows"][name] for s in samples] for name in COLUMNS]
            values += [column(samples, "total"), column(samples, "client_gap")]
            rows.append([kind, *(Figure.of(v).text(2) for v in values)])
        parts += [
            f"### {memory} MiB of memory",
            table(["median (range), s", *COLUMNS, "suspended", "client's longest gap"], rows),
            " ".join(_ratios(kinds)),
            _cat_line(kinds[OURS], kinds[CAT]),
            forecast_report.line([*kinds[OURS], *kinds[POST_COPY]]),
        ]
    return "\n\n".join(parts)


def _ratios(kinds: Mapping[str, Sequence[Sample]]) -> list[str]:
    """Suspended times, turn by turn."""
    said = []
    for under in (NAIVE, BASE):
        for over in (OURS, POST_COPY):
            if under in kinds:
                figure = ratio(column(kinds[over], "total"), column(kinds[under], "total"))
                said.append(f"Suspended, {over} / {under}: {figure.text(3)}.")
    return said


def _cat_line(ours: Sequence[Sample], cats: Sequence[Sample]) -> str:
    cat = column(cats, "seconds")
    net = [s["seconds"] - s["connect"] for s in cats]
    sent = [s["rows"][SENT] for s in ours]
    return (
        f"`ssh -c {CIPHER} HOST 'cat > /dev/shm/x'` of the same images: "
        f"{Figure.of(cat).text(2)} s, {Figure.of(net).text(2)} s of it without the connection's"
        f" beginning. {SENT}, as a part of it, turn by turn: {ratio(sent, cat).text(2)}"
        f" ({ratio(sent, net).text(2)})."
    )
