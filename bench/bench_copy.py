# SPDX-License-Identifier: Apache-2.0
"""Throughput of a copy through a pipe, and of a local one, against others.

    sudo python3 bench/bench_copy.py --repeat 7 --json copy.json

A loop device of random data whose file is cached; sender and receiver on this
machine.  Time is from the start of the processes until both have exited, when
the target is durable.  The source is idle, and our tracker is on.  Needs root,
the C tool (Debian's ploop), qemu-img, nbdcopy; see `--only`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common import (
    GIB,
    MIB,
    ROOT,
    SHM,
    Figure,
    Requirement,
    Results,
    Sample,
    Samples,
    Step,
    Usage,
    arguments,
    cleaned_up,
    column,
    finish,
    folder,
    heat,
    in_turns,
    installed,
    loop_device,
    noter,
    random_file,
    ratio,
    run,
    steady_memory,
    table,
    warm_memory,
)

sys.path.insert(0, str(ROOT / "tests" / "fakeploop"))
import fakeploop

GROUPS = ("tmpfs", "disk", "local", "local-disk")
REQUIRED = {
    ("tmpfs", "C pair"): 3.0,
    ("disk", "C pair"): 1.3,
    ("local", "qemu-img"): 1.0,
    ("local", "nbdcopy"): 2.0,
}
OURS = "pyploop"
BUFFERED = "pyploop --write buffered"


@dataclass
class Bench:
    """The source, and how each tool copies it."""

    device: str
    image: Path
    size: int
    scratch: Path
    """On tmpfs: logs, the C tool's mount point and preload library."""
    target: Path = Path()
    durable: bool = False
    """The target is on a disk: dd has to flush it as well."""
    heated: bool = True
    """Whole 2 MiB blocks of memory are warm as well (common.heat)."""
    c_image: str = ""
    pyploop: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    verified: set[tuple[Path, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.log = self.scratch / "messages"
        self.summary = self.scratch / "summary"
        self.mount = self.scratch / "mount"
        self.mount.mkdir()
        self.preload = fakeploop.build(self.scratch)
        self.env = installed(self.scratch)

    # ---- the tools

    def pyploop_pair(self, *options: str) -> Sample:
        send = [*self.pyploop, "-v-1", "copy", "-s", self.device, "--json", str(self.summary)]
        receive = [*self.pyploop, "-v-1", "copy", "-d", str(self.target), *options]
        usage = self._pair([*send, *self.extra], receive, self.env, self.env)
        return self._sample(usage, first_pass=self._first_pass())

    def c_pair(self) -> Sample:
        sees = fakeploop.env(
            self.preload, self.device, self.scratch, image=self.c_image, mount=self.mount
        )
        send = fakeploop.c_sender_cmd(verbose=-1)
        receive = fakeploop.c_receiver_cmd(self.target)
        return self._sample(self._pair(send, receive, sees, dict(os.environ)))

    def dd_pair(self) -> Sample:
        read_end, write_end = os.pipe()
        send = ["dd", f"if={self.device}", "iflag=direct", "bs=1M", "status=none"]
        receive = ["dd", f"of={self.target}", "bs=1M", "status=none"]
        if self.durable:
            receive.append("conv=fdatasync")
        steps = [Step(send, stdout=write_end), Step(receive, stdin=read_end)]
        return self._sample(run(steps, self.log, ours=(read_end, write_end)))

    def pyploop_local(self, *options: str) -> Sample:
        command = [*self.pyploop, "-v-1", "copy", "-s", self.device, "-d", str(self.target)]
        command += ["--json", str(self.summary), *options, *self.extra]
        usage = run([Step(command, env=self.env)], self.log)
        return self._sample(usage, first_pass=self._first_pass())

    def qemu_img(self) -> Sample:
        command = ["qemu-img", "convert", "-f", "raw", "-O", "raw", self.device, str(self.target)]
        return self._sample(run([Step(command)], self.log))

    def nbdcopy(self) -> Sample:
        with self.target.open("wb") as f:
            f.truncate(self.size)
        return self._sample(run([Step(["nbdcopy", self.device, str(self.target)])], self.log))

    # ---- around them

    def _pair(
        self, send: list[str], receive: list[str], sees: dict[str, str], env: dict[str, str]
    ) -> Usage:
        stream_r, stream_w = os.pipe()
        answer_r, answer_w = os.pipe()
        steps = [
            Step([*send, "-f", str(answer_r)], env=sees, stdout=stream_w, fds=[answer_r]),
            Step([*receive, "-f", str(answer_w)], env=env, stdin=stream_r, fds=[answer_w]),
        ]
        return run(steps, self.log, ours=(stream_r, stream_w, answer_r, answer_w))

    def _first_pass(self) -> float:
        events = map(json.loads, self.summary.read_text().splitlines())
        return next(float(e["first_pass"]) for e in events if e["event"] == "summary")

    def _sample(self, usage: Usage, first_pass: float | None = None) -> Sample:
        return {
            "seconds": round(usage.seconds, 4),
            "mb_per_s": round(self.size / usage.seconds / 1e6, 1),
            "cpu_per_gib": round(usage.cpu / (self.size / GIB), 4),
            "first_pass": first_pass,
            **{key: value for key, value in asdict(usage).items() if key not in ("seconds", "cpu")},
        }

    def case(self, name: str, tool: Callable[[], Sample], target: Path, durable: bool) -> Sample:
        """One run of one tool into a new file, compared the first time."""
        self.target, self.durable = target, durable
        target.unlink(missing_ok=True)
        os.sync()
        if self.heated:
            heat(self.size + self.size // 8)
        try:
            sample = tool()
            key = (target, name)
            if key not in self.verified:
                subprocess.run(["cmp", self.device, str(target)], check=True)
                self.verified.add(key)
        finally:
            target.unlink(missing_ok=True)
        return sample


def cases(bench: Bench, group: str, disk: Path, skip: set[str]) -> dict[str, Callable[[], Sample]]:
    on_disk = "disk" in group
    tools: dict[str, Callable[[], Sample]]
    if "local" in group:
        tools = {
            OURS: bench.pyploop_local,
            "qemu-img": bench.qemu_img,
            "nbdcopy": bench.nbdcopy,
        }
    else:
        tools = {OURS: bench.pyploop_pair, "C pair": bench.c_pair, "dd pair": bench.dd_pair}
    if on_disk:
        ours = bench.pyploop_local if "local" in group else bench.pyploop_pair
        tools[BUFFERED] = lambda: ours("--write", "buffered")
    target = (disk if on_disk else bench.scratch) / "target"

    def bind(name: str, tool: Callable[[], Sample]) -> Callable[[], Sample]:
        return lambda: bench.case(name, tool, target, on_disk)

    return {name: bind(name, tool) for name, tool in tools.items() if name not in skip}


def choose_c_image(bench: Bench, note: Callable[[str], None]) -> dict[str, Figure]:
    """What the C tool reads faster becomes its image: device or backing file."""
    choices = {"device": bench.device, "file": str(bench.image)}

    def bind(image: str) -> Callable[[], Sample]:
        def measure() -> Sample:
            bench.c_image = image
            return bench.case(f"C pair {image}", bench.c_pair, bench.scratch / "target", False)

        return measure

    samples = in_turns({name: bind(image) for name, image in choices.items()}, 3, note)
    speeds = {name: Figure.of(column(samples[name], "mb_per_s")) for name in choices}
    best = max(choices, key=lambda name: speeds[name].median)
    bench.c_image = choices[best]
    return speeds


def report(group: str, samples: Samples) -> str:
    """One group's table."""
    rows = []
    ours = samples.get(OURS)
    for name, runs in samples.items():
        first = column(runs, "first_pass")
        against = ""
        if ours and name != OURS:
            against = ratio(column(ours, "mb_per_s"), column(runs, "mb_per_s")).text()
        rows.append(
            [
                name,
                Figure.of(column(runs, "seconds")).text(),
                Figure.of(column(runs, "mb_per_s")).text(0),
                Figure.of(first).text() if first else "",
                Figure.of(column(runs, "cpu_per_gib")).text(),
                f"{max(max(run['rss']) for run in runs):.0f}",
                against,
            ]
        )
    head = ["", "seconds", "MB/s", "first pass, s", "CPU s/GiB", "RSS MiB", f"{OURS} is x times"]
    return f"{group}, median (min..max):\n" + table(head, rows)


def requirements(group: str, samples: Samples) -> list[Requirement]:
    return [
        Requirement(
            f"{group}: {OURS} / {other}",
            ratio(column(samples[OURS], "mb_per_s"), column(samples[other], "mb_per_s")),
            least,
        )
        for (of_group, other), least in REQUIRED.items()
        if of_group == group and other in samples and OURS in samples
    ]


def options() -> argparse.Namespace:
    p = arguments(__doc__, repeat=7)
    add = p.add_argument
    add("--size", type=int, default=2048, metavar="MIB", help="of the source (2048)")
    add("--only", default=",".join(GROUPS), help="of %(default)s")
    add("--skip", default="", metavar="TOOLS", help="tools to leave out, e.g. 'dd pair'")
    add("--target-dir", type=Path, default=Path("/var/tmp"), help="on the disk (%(default)s)")
    add("--source-dir", type=Path, default=SHM, help="of the loop device's file (%(default)s)")
    add(
        "--c-image",
        choices=("auto", "device", "file"),
        default="device",
        help="what the C tool reads (device: as the others do; auto: the faster one for it)",
    )
    add("--pyploop", type=shlex.split, default=[sys.executable, "-m", "pyploop.cli.main"])
    add("--extra", type=shlex.split, default=[], help="options for our sender")
    add("--no-heat", dest="heat", action="store_false", help="leave whole free blocks cold")
    return p.parse_args()


def main() -> int:
    o = options()
    groups = o.only.split(",")
    if unknown := set(groups) - set(GROUPS):
        raise SystemExit(f"--only: no {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    size = o.size * MIB
    results, note = Results(settings={k: str(v) for k, v in vars(o).items()}), noter(o)
    with cleaned_up() as stack:
        name = f"bench-copy-{os.getpid()}"
        memory = stack.enter_context(steady_memory())
        scratch = stack.enter_context(folder(SHM / name))
        source = stack.enter_context(folder(o.source_dir / f"{name}-source"))
        disk = stack.enter_context(folder(o.target_dir / name))
        image = source / "image"
        random_file(image, size)
        device = stack.enter_context(loop_device(image))
        stack.enter_context(warm_memory(size * 3 // 2 + GIB))
        bench = Bench(device, image, size, scratch, pyploop=o.pyploop, extra=o.extra)
        bench.heated = o.heat
        print(f"Source: {device} on {image}, {o.size} MiB of random data")
        print(f"Disk target: {disk}; {shutil.disk_usage(disk).free / GIB:.0f} GiB free")
        print(f"Memory: {memory}")
        results.settings["memory"] = memory
        skip = set(o.skip.split(","))
        if {"tmpfs", "disk"} & set(groups) and "C pair" not in skip:
            if o.c_image == "auto":
                speeds = choose_c_image(bench, note)
                told = ", ".join(f"{k} {v.text(0)} MB/s" for k, v in speeds.items())
                results.settings["c_image_speeds"] = {k: vars(v) for k, v in speeds.items()}
            else:
                bench.c_image = device if o.c_image == "device" else str(image)
                told = "as told"
            results.settings["c_image_used"] = bench.c_image
            print(f"The C tool reads {bench.c_image} ({told})")
        for group in groups:
            samples = in_turns(cases(bench, group, disk, skip), o.repeat, note)
            results.samples[group] = samples
            results.requirements += requirements(group, samples)
            print("\n" + report(group, samples), flush=True)
    return finish(results, o)


if __name__ == "__main__":
    sys.exit(main())
