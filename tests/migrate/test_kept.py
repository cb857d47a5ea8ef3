# SPDX-License-Identifier: Apache-2.0
"""`--keep-dst`: the next migration goes on from what a failed one has kept."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import support
from vzlab import CTID, VzHost, VzLab, vz_lab

MIB = 1 << 20
DATA = 16 * MIB
"""Random bytes in a file on the container's disk, and half as many in a lower delta."""


@dataclass
class Kept:
    """A lab whose container has something to copy."""

    lab: VzLab
    data: bytearray
    lower: bytearray

    @property
    def folder(self) -> Path:
        return self.lab.b.folder / "private"

    def files(self) -> list[Path]:
        """What host b keeps: the disk, then the lower delta."""
        found = [p for p in self.folder.glob(".*.pyploop-kept") if p.is_file()]
        return sorted(found, key=lambda p: p.stat().st_size == DATA // 2)

    def record(self) -> dict[str, Any]:
        return dict(
            json.loads((self.lab.b.folder / f"varlib/pyploop/vzctl-{CTID}.kept").read_text())
        )

    def write(self, at: int, data: bytes) -> None:
        """The container writes into its file."""
        self.data[at : at + len(data)] = data
        with (self.lab.a.folder / f"root/{CTID}/data").open("r+b") as f:
            f.seek(at)
            f.write(data)
            f.flush()
            os.fsync(f.fileno())

    def migrate(self, *words: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
        """--live from a to b: how it ended, and its events."""
        events = self.lab.folder / "events"
        done = self.lab.migrate(self.lab.a, "--live", "--json", str(events), *words, "hostb", CTID)
        assert "Traceback" not in done.stderr
        return done, [json.loads(line) for line in events.read_text().splitlines()]

    def fail(self, *words: str) -> None:
        """One that fails when all is copied."""
        self.lab.b.fail("restore --undump", 17)
        done, _ = self.migrate(*words)
        assert done.returncode == 7, done.stderr
        self.lab.b.mend()
        assert self.lab.a.status() == "running"

    def arrives(self, *words: str) -> list[dict[str, Any]]:
        """The next one succeeds: all is there, as it is at the source, and nothing else."""
        done, events = self.migrate(*words)
        assert done.returncode == 0, done.stderr
        b = self.lab.b
        assert (b.folder / f"root/{CTID}/data").read_bytes() == self.data
        assert (self.folder / CTID / "root.hdd/lower.hds").read_bytes() == self.lower
        runs_only_on(self.lab, b)
        return events


def runs_only_on(lab: VzLab, host: VzHost) -> None:
    other = lab.b if host is lab.a else lab.a
    assert (host.status(), other.status()) == ("running", "down")
    before = len(host.numbers())
    support.wait_until(lambda: len(host.numbers()) > before, "it counts on")
    numbers = host.numbers()
    assert numbers == list(range(len(numbers)))
    assert other.files() == set()
    assert not [p for p in host.files() if p.startswith(("lock", "images", "varlib"))]
    assert not [p for p in host.files() if p.endswith(".pyploop-kept")]
    assert lab.loops() == [str(host.folder / f"private/{CTID}/root.hdd/root.hds")]


def reused(events: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Name -> bytes that were kept, and that are the same."""
    return {e["name"]: (e["held"], e["same"]) for e in events if e["event"] == "reused"}


def first_pass(events: list[dict[str, Any]]) -> int:
    """Bytes of the disk that were sent then.  The rounds after it send what the container
    writes meanwhile, and a slow machine gives it the time to write more."""
    return int(next(e for e in events if e["event"] == "round" and e["number"] == 0)["sent"])


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    support.needs("root", "loop", "mkfs.ext4")
    rng = random.Random(3)
    with vz_lab(tmp_path) as lab:
        made = Kept(lab, bytearray(rng.randbytes(DATA)), bytearray(rng.randbytes(DATA // 2)))
        (lab.a.folder / f"root/{CTID}/data").write_bytes(made.data)
        (lab.a.folder / f"private/{CTID}/root.hdd/lower.hds").write_bytes(made.lower)
        yield made


def test_the_next_migration_sends_only_what_differs(kept: Kept) -> None:
    kept.fail("--keep-dst")
    assert kept.lab.b.status() == "down"
    assert {f["name"] for f in kept.record()["files"]} == {"disk 0", "private:root.hdd/lower.hds"}
    assert not (kept.folder / CTID).exists()
    # What the container writes meanwhile: other data, and zeroes where there were some.
    kept.write(3 * MIB + 5, random.Random(4).randbytes(100_000))
    kept.write(9 * MIB, bytes(MIB))
    before = kept.files()[0].stat().st_ino
    events = kept.arrives()
    top = kept.folder / CTID / "root.hdd/root.hds"
    assert top.stat().st_ino == before
    held, same = reused(events)["disk 0"]
    assert DATA <= held < 2 * DATA
    # The rest, inodes and the journal, changes as the container runs.
    assert DATA - 2 * MIB < same < held - MIB
    assert first_pass(events) + same <= blocks(top) + 2 * MIB  # with zeroes, now holes
    assert reused(events)["private:root.hdd/lower.hds"] == (DATA // 2, DATA // 2)


def test_what_is_kept_goes_when_the_next_one_fails_without_keep_dst(kept: Kept) -> None:
    kept.fail("--keep-dst")
    kept.fail("--keep-dst")
    assert len(kept.files()) == 2
    kept.fail()
    assert kept.lab.b.files() == set()


def test_a_disk_that_fills_up_meanwhile_is_kept_as_far_as_it_came(kept: Kept) -> None:
    with support.tmpfs(kept.folder, 40 * MIB):
        filler = kept.folder / "filler"
        filler.write_bytes(bytes(20 * MIB))
        done, _ = kept.migrate("--keep-dst")
        assert done.returncode == 6, done.stderr
        assert "No space left" in done.stdout + done.stderr
        filler.unlink()
        kept.write(0, random.Random(6).randbytes(MIB))
        events = kept.arrives()
        assert reused(events)["private:root.hdd/lower.hds"] == (DATA // 2, DATA // 2)
        assert reused(events)["disk 0"][1] > 4 * MIB
        kept.lab.b.vzctl("--skiplock", "chkpnt", CTID, "--kill")
        kept.lab.b.vzctl("--skiplock", "umount", CTID)


KILLED = ["migrate", "agent", "both"] if os.environ.get("PYPLOOP_MATRIX") else ["both"]
"""Who; all of them with PYPLOOP_MATRIX=1."""


@pytest.mark.parametrize("disturbed", KILLED)
def test_what_a_killed_migration_had_copied_is_gone_on_with(kept: Kept, disturbed: str) -> None:
    """Killed in the first pass, and again while it goes on from that."""
    for least in (2 * MIB, 5 * MIB):
        kill_midway(kept, disturbed, least)
        assert kept.lab.a.status() == "running"
        support.wait_until(lambda: disturbed == "both" or kept.files(), "it is kept")
    kept.write(MIB, random.Random(5).randbytes(70_000))
    events = kept.arrives()
    held, same = reused(events)["disk 0"]
    assert 4 * MIB <= same <= held
    top = kept.folder / CTID / "root.hdd/root.hds"
    assert first_pass(events) + same <= blocks(top) + MIB


def kill_midway(kept: Kept, whom: str, least: int) -> None:
    """SIGKILL of one end, or both, when host b has so much of the disk.  The rest takes
    seconds, so that a busy machine finds it under way."""
    lab = kept.lab
    process = subprocess.Popen(
        lab.command(lab.a, "--live", "--keep-dst", "--bwlimit", "2M", "hostb", CTID),
        env=support.pyploop_env(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        support.wait_until(lambda: any(blocks(f) > least for f in kept.files()[:1]), "midway")
        victims = agents(lab.b) if whom != "migrate" else []
        for pid in [process.pid, *victims] if whom != "agent" else victims:
            os.kill(pid, signal.SIGKILL)
        process.wait(30)
    finally:
        process.kill()
        process.wait()


def agents(host: VzHost) -> list[int]:
    """Processes of `pyploop agent` on the host."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"agent" in words and os.fsencode(host.folder / "migrate.toml") in words:
                found.append(int(path.parent.name))
    assert found, f"no agent on {host.name}"
    return found


def blocks(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_blocks * 512
    return 0
