# SPDX-License-Identifier: Apache-2.0
"""What tracking costs the writers of a device.

    sudo python3 bench/bench_overhead.py --repeat 9 --json overhead.json

fio, 4 KiB random writes, on a loop device whose file is on tmpfs: raw with
O_DIRECT, and in a file of an ext4 on it, each with one and with 16 requests in
flight; our BPF tracker off and on in turns, started in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from common import (
    MIB,
    SHM,
    Figure,
    Requirement,
    Results,
    Sample,
    Samples,
    arguments,
    cleaned_up,
    column,
    finish,
    folder,
    in_turns,
    loop_device,
    mounted,
    noter,
    random_file,
    ratio,
    steady_memory,
    table,
    warm_memory,
)

from pyploop.disks import opening as devices
from pyploop.trackers.bpf import BpfTracker

REQUIRED = 0.97
WHERE = ("raw", "ext4")
DEPTHS = (1, 16)


def fio(path: Path, size: int, depth: int, seconds: float) -> Sample:
    """IOPS of one run, and what the machine did meanwhile."""
    command = ["fio", "--name=bench", f"--filename={path}", f"--size={size}", "--rw=randwrite"]
    command += ["--bs=4k", "--direct=1", "--ioengine=libaio", f"--iodepth={depth}"]
    command += ["--time_based", f"--runtime={seconds}", "--ramp_time=0.3", "--norandommap"]
    command += ["--randseed=7", "--output-format=json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise RuntimeError(f"fio ended with {process.returncode}: {err.decode()}")
    job = json.loads(out)["jobs"][0]
    return {
        "iops": round(job["write"]["iops"]),
        "p99_us": round(job["write"]["clat_ns"]["percentile"]["99.000000"] / 1000, 1),
        "cpu": round(job["usr_cpu"] + job["sys_cpu"], 1),
    }


@contextlib.contextmanager
def tracked(device: str) -> Iterator[BpfTracker]:
    """Our tracker on the device, as `pyploop copy` has it during the first pass."""
    with contextlib.closing(devices.open_source(device)) as source:
        tracker = BpfTracker(source)
        tracker.start()
        try:
            yield tracker
        finally:
            tracker.stop(ok=False)


def measure(
    device: str, path: Path, size: int, *, depth: int, seconds: float, tracking: bool
) -> Sample:
    if not tracking:
        return fio(path, size, depth, seconds)
    with tracked(device) as tracker:
        sample = fio(path, size, depth, seconds)
        if not tracker.pending():
            raise RuntimeError("the tracker saw no write: nothing was measured")
    return sample


def report(all_samples: dict[str, Samples], requirements: list[Requirement]) -> str:
    rows = [
        [
            name,
            Figure.of(column(samples["off"], "iops")).text(0),
            Figure.of(column(samples["on"], "iops")).text(0),
            Figure.of(column(samples["off"], "p99_us")).text(0),
            Figure.of(column(samples["on"], "p99_us")).text(0),
            requirement.figure.text(3),
        ]
        for (name, samples), requirement in zip(all_samples.items(), requirements, strict=True)
    ]
    head = ["", "IOPS, off", "IOPS, on", "p99 us, off", "p99 us, on", "on / off"]
    return "4k random writes, median (min..max):\n" + table(head, rows)


def options() -> argparse.Namespace:
    p = arguments(__doc__, repeat=9)
    add = p.add_argument
    add("--size", type=int, default=512, metavar="MIB", help="of the device (512)")
    add("--seconds", type=float, default=2.0, help="of one fio run (2)")
    add("--only", default=",".join(WHERE), help="of %(default)s")
    return p.parse_args()


def main() -> int:
    o = options()
    where = o.only.split(",")
    if unknown := set(where) - set(WHERE):
        raise SystemExit(f"--only: no {', '.join(unknown)}; there are {', '.join(WHERE)}")
    results, note = Results(settings={k: str(v) for k, v in vars(o).items()}), noter(o)
    with cleaned_up() as stack:
        results.settings["memory"] = stack.enter_context(steady_memory())
        scratch = stack.enter_context(folder(SHM / f"bench-overhead-{os.getpid()}"))
        stack.enter_context(warm_memory(o.size * MIB))
        image = scratch / "image"
        random_file(image, o.size * MIB)
        device = stack.enter_context(loop_device(image))
        for kind in where:
            with contextlib.ExitStack() as mounts:
                path, size = Path(device), o.size * MIB
                if kind == "ext4":
                    # Nothing but fio's writes: no lazy initialisation.
                    quiet = ["-qF", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
                    subprocess.run(["mkfs.ext4", *quiet, device], check=True)
                    at = mounts.enter_context(mounted(device, scratch / "mount"))
                    path, size = at / "file", o.size * MIB // 2
                    random_file(path, size)
                for depth in DEPTHS:

                    def bind(
                        tracking: bool, path: Path = path, size: int = size, depth: int = depth
                    ) -> Callable[[], Sample]:
                        return lambda: measure(
                            device, path, size, depth=depth, seconds=o.seconds, tracking=tracking
                        )

                    name = f"{kind}, queue depth {depth}"
                    note(name)
                    samples = in_turns({"off": bind(False), "on": bind(True)}, o.repeat, note)
                    results.samples[name] = samples
                    on_off = ratio(column(samples["on"], "iops"), column(samples["off"], "iops"))
                    results.requirements.append(Requirement(f"{name}: on / off", on_off, REQUIRED))
                if kind == "ext4":
                    path.unlink()
    print(report(results.samples, results.requirements))
    return finish(results, o)


if __name__ == "__main__":
    sys.exit(main())
