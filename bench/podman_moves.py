#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How long a container of Podman stands still while it moves, in turns:

    pyploop   pyploop migrate --live b podman:ct
    podman    podman container checkpoint --export; scp; podman container restore --import

    python3 bench/podman_moves.py [--moves 6] [--memory MIB] [--volume MIB] [--limit PERCENT]

Two hosts in namespaces on one machine (tests/lab), each with a Podman of its own.  The
container appends records to a file in a volume, and fsyncs each; what counts is the
longest time between two of them.  Podman's archive is not compressed, and lies on disk.
Nobody is connected to the container: a connection would not survive Podman's own way.
Prints one line of JSON for each move, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import common  # noqa: F401 - finds `lab`
from lab import container, hosts, podman, verify
from lab.hosts import Host, Lab

MIB = 1 << 20
ARCHIVE = "/srv/moved.tar"
SETTLED = 2.0
"""Seconds before and after a move, in which the container only works."""


def by_podman(lab: Lab, source: Host) -> None:
    target = lab.other(source)
    flags = ("--tcp-established", "--file-locks")
    export = ("--export", ARCHIVE, "--compress", "none")
    source.run("podman", "container", "checkpoint", *export, *flags, podman.NAME, timeout=600)
    source.run("scp", "-q", ARCHIVE, f"{target.name}:{ARCHIVE}", timeout=600)
    target.run("podman", "container", "restore", "--import", ARCHIVE, *flags, timeout=600)
    source.run("podman", "rm", "--force", podman.NAME)
    source.run("podman", "volume", "rm", podman.VOLUME)
    for host in (source, target):
        host.run("rm", ARCHIVE)


def by_pyploop(lab: Lab, source: Host) -> None:
    word = ["pyploop", "migrate", "--live", "--config", container.PYPLOOP_CONFIG]
    source.run(*word, lab.other(source).name, f"podman:{podman.NAME}", timeout=600)


def gap(host: Host, since: int, until: int) -> float:
    """The longest time without a durable record, in seconds."""
    data = host.outside(podman.STORAGE / "volumes" / podman.VOLUME / "_data")
    with tempfile.TemporaryDirectory() as name:
        os.symlink(data, Path(name, "data"))
        return verify.check_append_log(Path(name)).gap(since, until)


def fill(host: Host, size: int) -> None:
    path = host.outside(podman.STORAGE / "volumes" / podman.VOLUME / "_data/filling")
    with path.open("wb") as f:
        for _ in range(size >> 20):
            f.write(os.urandom(MIB))


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--moves", type=int, default=6)
    p.add_argument("--memory", type=int, default=0, help="MiB that the container holds")
    p.add_argument("--volume", type=int, default=0, help="MiB in its volume")
    p.add_argument("--limit", type=float, help="fail when the ratio is above this")
    args = p.parse_args()
    found: dict[str, list[float]] = {"pyploop": [], "podman": []}
    with hosts.lab() as lab, podman.running(lab, memory=args.memory * MIB):
        fill(lab.a, args.volume * MIB)
        guest = lab.folder / "guest"
        podman.import_image(lab.b, guest)  # Podman itself moves no image
        image = podman.images(lab.a)
        if podman.images(lab.b) != image:
            lab.a.run("podman", "save", "-q", "-o", "/srv/image.tar", podman.IMAGE)
            lab.b.run("podman", "rmi", "--all")
            lab.a.run("scp", "-q", "/srv/image.tar", "b:/srv/image.tar")
            lab.b.run("podman", "load", "-q", "-i", "/srv/image.tar")
        here = lab.a
        for turn in range(args.moves):
            # Both ways go in both directions.
            way = ("pyploop", "podman", "podman", "pyploop")[turn % 4]
            time.sleep(SETTLED)
            since = time.time_ns()
            (by_pyploop if way == "pyploop" else by_podman)(lab, here)
            here = lab.other(here)
            time.sleep(SETTLED)
            seconds = gap(here, since, time.time_ns())
            found[way].append(seconds)
            print(json.dumps({"way": way, "to": here.name, "gap": round(seconds, 3)}), flush=True)
    medians = {way: statistics.median(s) for way, s in found.items()}
    ratio = medians["pyploop"] / medians["podman"]
    print(json.dumps({"medians": medians, "ratio": round(ratio, 3)}))
    return int(args.limit is not None and ratio > args.limit)


if __name__ == "__main__":
    raise SystemExit(main())
