# SPDX-License-Identifier: Apache-2.0
"""The frozen time of the disk, of three generations of `ploop copy` and ours.

    sudo python3 bench/bench_freeze.py --repeat 10 --append freeze.ndjson
    python3 bench/freeze_report.py freeze.ndjson
    sudo python3 bench/bench_freeze.py --other /opt/older/bin/pyploop --modes other,pyploop

A loop device with a mounted ext4, the load in it, a copy of it through a pipe;
each kind of copy (freeze_rig.py) once per repetition, in turns.  Can be run in
slices (`--loads`): what is in FILE is kept.  Needs root, Debian's ploop and
fio, and Linux 6.5.  The last command compares two versions of pyploop.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import freeze_report
from common import GIB, MIB, cleaned_up, folder, loop_device, mounted, random_file, warm_memory
from freeze_loads import Pace, prepare, running
from freeze_report import LOADS, MODES, OTHER
from freeze_rig import Rig

MKFS = ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
"""Without the kernel thread that would write to an idle file system."""


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = p.add_argument
    add("--repeat", type=int, default=10, metavar="N", help="counted repetitions (10)")
    add("--loads", default=",".join(LOADS), help="of %(default)s")
    add("--modes", default=",".join(MODES), help="of %(default)s, and of other")
    add("--size", type=int, default=1024, metavar="MIB", help="of the source (1024)")
    add("--settle", type=float, default=2.0, metavar="S", help="of the load, before a copy (2)")
    add("--source-dir", type=Path, default=Path("/var/tmp"), help="of the loop device's file")
    add("--target-dir", type=Path, default=Path("/var/tmp"), help="of the copies")
    add("--pyploop", type=shlex.split, default=[sys.executable, "-m", "pyploop.cli.main"])
    add("--other", type=shlex.split, default=[], help="another pyploop, for the mode `other`")
    add("--extra", type=shlex.split, default=[], help="options for our sender")
    add("--other-extra", type=shlex.split, help="the same for that of `other` (as --extra)")
    add("--append", type=Path, metavar="FILE", help="one line of JSON per copy")
    add("--quick", action="store_true", help="a small disk, one repetition, no sleep in 1.11")
    add("-v", "--verbose", action="store_true")
    o = p.parse_args()
    if o.other_extra is None:
        o.other_extra = o.extra
    o.loads, o.modes = o.loads.split(","), o.modes.split(",")
    known_modes = (*MODES, OTHER) if o.other else MODES
    for given, known in ((o.loads, LOADS), (o.modes, known_modes)):
        if unknown := set(given) - set(known):
            p.error(f"no {', '.join(unknown)}; there are {', '.join(known)}")
    if o.quick:
        o.size, o.repeat, o.settle = 256, 1, 0.2
    return o


def measure(o: argparse.Namespace, rig: Rig, run: dict[str, Any]) -> list[dict[str, Any]]:
    """All samples, each with what `run` has; written down as they come."""
    records = []
    pace = Pace.of_disk(o.size * MIB)
    for load in o.loads:
        # The first turn warms caches and is not counted.
        for turn in range(0 if not o.quick else 1, o.repeat + 1):
            for i in range(len(o.modes)):
                mode = o.modes[(turn + i) % len(o.modes)]
                with running(rig.mount, load, pace, o.settle) as running_load:
                    sample = rig.sample(mode, running_load)
                # What the load left must not be written back in the next copy.
                os.sync()
                record = {"load": load, "mode": mode, "turn": turn, **run, **rounded(sample)}
                if o.verbose:
                    print(json.dumps(record), file=sys.stderr, flush=True)
                if turn:
                    records.append(record)
                    if o.append:
                        with o.append.open("a") as f:
                            f.write(json.dumps(record) + "\n")
    return records


def rounded(value: Any) -> Any:
    """Seconds to a microsecond: more is noise in a recorded file."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return round(value, 6) if isinstance(value, float) else value


def commit() -> str:
    """What is measured."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> int:
    o = arguments()
    with cleaned_up() as stack:
        name = f"bench-freeze-{os.getpid()}"
        source = stack.enter_context(folder(o.source_dir / f"{name}-source"))
        target = stack.enter_context(folder(o.target_dir / f"{name}-target"))
        scratch = stack.enter_context(folder(Path("/dev/shm") / name))
        image = source / "image"
        with image.open("wb") as f:
            f.truncate(o.size * MIB)
        subprocess.run([*MKFS, str(image)], check=True)
        device = stack.enter_context(loop_device(image))
        point = stack.enter_context(mounted(device, source / "mount"))
        random_file(point / "data", o.size * MIB // 16)
        prepare(point, Pace.of_disk(o.size * MIB))
        if not o.quick:
            stack.enter_context(warm_memory(2 * GIB))
        rig = Rig(
            device,
            image,
            point,
            target / "copy",
            scratch,
            o.pyploop,
            o.extra,
            o.other,
            o.other_extra,
            c_sleep=not o.quick,
        )
        run = {"run": int(time.time()), "commit": commit(), "kernel": os.uname().release}
        records = measure(o, rig, run)
    print(freeze_report.text(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
