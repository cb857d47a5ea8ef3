# SPDX-License-Identifier: Apache-2.0
"""Two hosts in one folder, and a container of nobody's runtime (anyhost.py) on
two disks, with an ssh between them that is a shell."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import support

HERE = Path(__file__).parent
STEPS = ("status", "suspend", "resume", "dump", "undump", "resume_restored", "kill")
STEPS_TOO = ("abandon", "start", "stop")
SSH = '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nexec sh -c "$3"\n'


@dataclass(frozen=True)
class Pair:
    a: Path
    b: Path

    def disk(self, name: str) -> tuple[Path, Path]:
        """Image and mount point of a disk on a."""
        return self.a / f"{name}.img", self.a / name

    def step(self, host: Path, step: str) -> str:
        return support.run(sys.executable, HERE / "anyhost.py", host, step).strip()

    @contextlib.contextmanager
    def moving(self, source: Path, option: str = "--live") -> Iterator[subprocess.Popen[str]]:
        """A migration, whose messages go to one pipe; ended here in any case."""
        words = ["migrate", "--config", str(source / "migrate.toml"), option, "other", "box"]
        process = subprocess.Popen(
            [*support.pyploop_cmd(), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=support.pyploop_env(),
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def migrate(self, source: Path, *options: str) -> subprocess.CompletedProcess[str]:
        words = ["migrate", "--config", str(source / "migrate.toml"), *options, "other", "box"]
        return subprocess.run(
            [*support.pyploop_cmd(), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=support.pyploop_env(),
        )

    def runs_only_on(self, host: Path) -> None:
        """Both disks have the same numbers, from 0 on, none missing."""
        other = self.b if host is self.a else self.a
        assert (self.step(host, "status"), self.step(other, "status")) == ("running", "absent")
        before = (host / "two/numbers").stat().st_size
        support.wait_until(lambda: (host / "two/numbers").stat().st_size > before, "counts on")
        self.step(host, "suspend")
        one, two = ((host / d / "numbers").read_text().split() for d in ("one", "two"))
        self.step(host, "resume")
        assert len(one) - len(two) in (0, 1)
        assert one == [str(n) for n in range(len(one))]
        assert two == one[: len(two)]
        left = {p.name for p in other.iterdir()} - {"migrate.toml", "ssh", "lock", "state"}
        assert left <= {"images", "one", "two"}, left
        assert not any((other / "images").iterdir())
        kept = (".json", ".rates")
        assert not [p for p in other.glob("state/*") if p.suffix not in kept]


SIZES = {"ext4": 24 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}
"""Of a disk, in bytes: as small as each file system is made."""


def make_disk(image: Path, fstype: str = "ext4") -> None:
    with image.open("wb") as f:
        f.truncate(SIZES[fstype])
    support.run(f"mkfs.{fstype}", "-q", *(["-F"] if fstype == "ext4" else []), image)


def _host(folder: Path, peer: Path, fstype: str, options: str) -> Path:
    for name in ("lock", "images"):
        (folder / name).mkdir(parents=True)
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    agent = [*support.pyploop_cmd(), "agent", "--source", folder.name]
    agent += ["--config", str(peer / "migrate.toml")]
    command = [sys.executable, str(HERE / "anyhost.py"), str(folder)]
    text = f'state_dir = "{folder}/state"\nlock_dir = "{folder}/lock"\n'
    text += f'images_dir = "{folder}/images"\n[trust]\nlive = ["{peer.name}"]\n'
    text += f'[remote]\nssh = ["{folder}/ssh"]\n'
    text += f'agent = {json.dumps(agent)}\n[container.box]\nruntime = "command"\n'
    text += "[container.box.commands]\n"
    text += "".join(f"{step} = {json.dumps([*command, step])}\n" for step in STEPS + STEPS_TOO)
    for disk in ("one", "two"):
        text += f'[[container.box.disk]]\nimage = "{folder}/{disk}.img"\n'
        text += f'mount = "{folder}/{disk}"\nfstype = "{fstype}"\noptions = {json.dumps(options)}\n'
    (folder / "migrate.toml").write_text(text)
    return folder


@contextlib.contextmanager
def any_pair(folder: Path, fstype: str = "ext4", options: str = "noatime,nodev") -> Iterator[Pair]:
    """The container runs on a, on two disks."""
    support.needs("root", "loop", f"mkfs.{fstype}")
    hosts = [_host(folder / n, folder / p, fstype, options) for n, p in (("a", "b"), ("b", "a"))]
    made = Pair(*hosts)
    try:
        for disk in ("one", "two"):
            make_disk(made.a / f"{disk}.img", fstype)
            (made.a / disk).mkdir()
            support.run("mount", "-t", fstype, "-o", f"loop,{options}", *made.disk(disk))
        made.step(made.a, "start")
        numbers = made.a / "two/numbers"
        support.wait_until(lambda: numbers.exists() and numbers.stat().st_size > 9, "it counts")
        yield made
    finally:
        for host in (made.a, made.b):
            made.step(host, "kill")
            for disk in ("one", "two"):
                support.unmount(host / disk)
        for line in support.run("losetup", "-nO", "NAME,BACK-FILE").splitlines():
            if str(folder) in line:
                support.run("losetup", "--detach", line.split()[0], check=False)
