# SPDX-License-Identifier: Apache-2.0
"""`pyploop copy SOURCE TARGET` between two hosts, each with its own sshd: a device that is
written to goes there and comes back, whatever ends in the middle."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab import hosts
from lab.hosts import SLOWNESS, Host, Lab
from support import (
    MIB,
    is_frozen,
    loop_device,
    missing,
    mounted,
    needs,
    telling,
    wait_until,
)
from support_live import comparison, end, sparse_file

pytestmark = pytest.mark.root

SIZE = 48 * MIB
SECONDS = 60.0 * SLOWNESS
POINT = "/srv/mnt"
PARTIAL = "vdb.img.pyploop-partial"
WRITES = (
    *("fio", "--name=w", f"--directory={POINT}", "--rw=randwrite", "--bsrange=4k-64k"),
    *("--fsync=16", "--ioengine=psync", "--size=12M", "--time_based", "--runtime=600", "--thread"),
    *("--randrepeat=0", "--norandommap", "--refill_buffers", "--output=/dev/null"),
)


@dataclass
class Ended:
    code: int
    errors: str
    events: list[dict[str, Any]]

    def event(self, name: str) -> dict[str, Any]:
        found = [e for e in self.events if e["event"] == name]
        assert found, f"no {name}: {self.code}: {self.errors}"
        return found[-1]


class Running:
    """A copy that a person started on a host."""

    def __init__(self, host: Host, *words: str, program: Sequence[str] = ("pyploop",)) -> None:
        self.host, self.log = host, host.folder / "copy.ndjson"
        self.log.unlink(missing_ok=True)
        self.out = host.folder / "copy.out"
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                host.command(*program, "-v4", "copy", *words, "--json", self.log),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def wait(self) -> Ended:
        self.process.wait(SECONDS)
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Ended(self.process.returncode, self.out.read_text(), [json.loads(x) for x in lines])

    def in_phase(self, name: str) -> bool:
        return self.log.exists() and f'"phase": "{name}"' in self.log.read_text()


@dataclass
class Scene:
    """Host a has a device with a file system that is written to; host b has none."""

    lab: Lab
    image: Path
    device: str

    @property
    def point(self) -> Path:
        return self.lab.a.outside(POINT)

    def pids(self, host: Host, what: str) -> list[int]:
        """Outside, the processes of pyploop on this host whose command has this word, the
        oldest first."""
        found = [
            p
            for p in Path("/proc").glob("[0-9]*")
            if what in _pyploop(_words(p)) and _is_on(p, host)
        ]
        return sorted((int(p.name) for p in found), key=_begun)

    def pid(self, host: Host, what: str) -> int:
        """The oldest of them: of the lanes that with the answers."""
        wait_until(lambda: self.pids(host, what), f"{what} runs on {host.name}", SECONDS)
        return self.pids(host, what)[0]

    def ends_writing(self) -> None:
        for pid, line in self.lab.a.processes().items():
            if line.startswith("fio"):
                self.lab.a.run("kill", "-9", pid, check=False)

    def is_clean(self) -> None:
        """No host has anything of a copy, but what the next one goes on from: the file system
        can be written to."""
        a, b = self.lab.a, self.lab.b
        wait_until(lambda: not _ours(a) and not _ours(b), "all processes end", SECONDS)
        assert not is_frozen(self.point)
        for host in (a, b):
            assert host.run("pyploop", "thaw", "--list") == ""
            folder = host.folder / "srv"
            left = {p.name for p in folder.iterdir()} - {"image", "mnt", PARTIAL}
            assert not left, left


def _begun(pid: int) -> int:
    """When it began, in clock ticks."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return 0


def _words(process: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def _pyploop(words: list[str]) -> list[str]:
    """The arguments of a pyploop, or `ssh` and the command that it runs."""
    if words[2:3] == ["pyploop.cli.main"]:
        return words[3:]
    return ["ssh " + words[-2]] if words[:1] == ["ssh"] and len(words) > 2 else []


def _is_on(process: Path, host: Host) -> bool:
    with contextlib.suppress(OSError):
        ours = Path(f"/proc/{host.pid}/ns/pid").readlink()
        return (process / "ns/pid").readlink() == ours
    return False


def _ours(host: Host) -> list[str]:
    return [x for x in host.processes().values() if "fio" not in x]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    needs("root", "loop", "fio", "mkfs.ext4", "ip", "ss", "ssh", "ssh-keygen", "nsenter", "setpriv")
    if not Path("/usr/sbin/sshd").exists():
        missing("needs /usr/sbin/sshd (Debian package openssh-server)")
    # How long an agent waits for a host that was killed, after the seconds of --retry.
    with hosts.lab(deadlines="copyagent.again.SLACK=1") as made:
        yield made


@pytest.fixture
def scene(lab: Lab) -> Iterator[Scene]:
    a = lab.a
    image = sparse_file(a.folder / "srv/image", SIZE)
    device = a.run("losetup", "--find", "--show", "/srv/image").strip()
    writer = None
    try:
        a.run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        a.run("mkdir", "-p", POINT)
        a.run("mount", device, POINT)
        writer = subprocess.Popen(a.command(*WRITES), stdin=subprocess.DEVNULL)
        wait_until(lambda: list(a.outside(POINT).glob("w.*")), "the writer", SECONDS)
        yield Scene(lab, image, device)
    finally:
        Scene(lab, image, device).ends_writing()
        if writer is not None:
            end(writer)
        a.run("umount", POINT, check=False)
        a.run("losetup", "-d", device, check=False)
        for path in (*a.folder.glob("srv/*"), *lab.b.folder.glob("srv/*")):
            if path.is_file():
                path.unlink()


# ---- the copy itself


def test_a_device_that_is_written_to_is_pushed_and_the_freeze_is_here(scene: Scene) -> None:
    target = scene.lab.b.folder / "srv/vdb.img"
    check = comparison(scene.image, target, SIZE)
    copy = Running(scene.lab.a, scene.device, "b:/srv/vdb.img", "--before-thaw", check)
    got = copy.wait()
    assert got.code == 0, got.errors
    summary = got.event("summary")
    assert (summary["source_host"], summary["target_host"]) == ("", "b")
    assert summary["acknowledged"] == "acknowledged"
    assert summary["completeness"] == "complete"
    assert summary["frozen_total"] > 0
    received = got.event("received")
    assert (received["host"], received["target"]) == ("b", "/srv/vdb.img")
    assert received["native_peer"] and received["image_size"] == SIZE
    target.unlink()
    scene.is_clean()


def test_the_target_on_the_other_host_may_be_a_device(scene: Scene, tmp_path: Path) -> None:
    """The devices of this machine are those of both hosts."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"\xa5" * (SIZE + MIB))
    with loop_device(disk) as device:
        check = f"cmp --bytes={SIZE} {scene.image} {disk}"
        words = [f"b:{device}", "--to-device", "--write", "direct", "--before-thaw", check]
        got = Running(scene.lab.a, scene.device, *words).wait()
        assert got.code == 0, got.errors
        received = got.event("received")
        assert received["target"] == device and received["direct_bytes"] > 0
        assert "O_DIRECT" in received["write_mode"]
        with mounted(device, tmp_path / "mnt"):
            refused = Running(scene.lab.a, scene.device, f"b:{device}", "--to-device").wait()
        assert refused.code != 0
        assert re.search(rf"b: .*{device}.* in use", refused.errors), refused.errors
    assert disk.read_bytes()[SIZE:] == b"\xa5" * MIB
    scene.is_clean()


def test_a_device_that_is_written_to_is_pulled_and_the_freeze_is_there(scene: Scene) -> None:
    b = scene.lab.b
    target = b.folder / "srv/vdb.img"
    # It runs on the host that has the source.
    check = f"test $(hostname) = a && {comparison(scene.image, target, SIZE)}"
    copy = Running(b, f"a:{scene.device}", "/srv/vdb.img", "--freeze", "fs", "--before-thaw", check)
    got = copy.wait()
    assert got.code == 0, got.errors
    summary = got.event("summary")
    assert (summary["source_host"], summary["target_host"]) == ("a", "")
    assert summary["acknowledged"] == "acknowledged"
    assert summary["completeness"] == "complete"
    assert {e["event"] for e in got.events if e.get("host") == "a"} >= {
        *("sending", "phase", "round", "frozen", "summary")
    }
    assert "host" not in got.event("received")
    target.unlink()
    scene.is_clean()


# ---- what ends in the middle


def writes_wait(scene: Scene) -> subprocess.Popen[bytes]:
    """A write that waits for the thaw, once the file system is frozen.  (To try a freeze
    could come between the copy and its own.)"""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        probe = subprocess.Popen(scene.lab.a.command("touch", f"{POINT}/probe"))
        try:
            probe.wait(1.0 * SLOWNESS)
        except subprocess.TimeoutExpired:
            return probe
    raise AssertionError("the file system was not frozen")


WAIT = "touch {flag}; while [ ! -e {go} ]; do sleep 0.02; done"


@contextlib.contextmanager
def frozen(
    scene: Scene, way: str
) -> Iterator[tuple[Running, dict[str, int], subprocess.Popen[bytes]]]:
    """A copy that stands in its freeze, since its receiver is stopped (SIGSTOP).  Yields it,
    its processes (here, there, lane), and a write that ends with the thaw."""
    here, there = (scene.lab.a, scene.lab.b) if way == "push" else (scene.lab.b, scene.lab.a)
    flag, go = scene.lab.folder / "flag", scene.lab.folder / "go"
    places = (
        (scene.device, "b:/srv/vdb.img") if way == "push" else (f"a:{scene.device}", "/srv/vdb.img")
    )
    words = ("-F", WAIT.format(flag=flag, go=go), "--undo", f"rm -f {flag}", "--retry", "5")
    copy = Running(here, *places, *words)
    stopped = None
    try:
        wait_until(flag.exists, "the stop command runs", SECONDS)
        pids = {
            "here": scene.pid(here, "copy"),
            "there": scene.pid(there, "copy-agent"),
            "lane": scene.pid(there, "copy-lane"),
        }
        stopped = pids["there" if way == "push" else "here"]
        os.kill(stopped, signal.SIGSTOP)
        go.touch()
        probe = writes_wait(scene)
        yield copy, pids, probe
    finally:
        if stopped is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGCONT)
        end(copy.process)
        flag.unlink(missing_ok=True)
        go.unlink(missing_ok=True)


@pytest.mark.invariant(number=3)
@pytest.mark.parametrize(
    ("way", "victim"), [("push", "here"), ("push", "there"), ("pull", "here"), ("pull", "there")]
)
def test_a_kill_of_either_end_in_the_freeze_thaws_the_source_and_leaves_no_target(
    scene: Scene, way: str, victim: str
) -> None:
    with frozen(scene, way) as (copy, pids, write):
        os.kill(pids[victim], signal.SIGKILL)
        write.wait(SECONDS)  # the receiver is stopped still
        if way == "pull" and victim == "there":
            os.kill(pids["here"], signal.SIGCONT)
            copy.process.send_signal(signal.SIGCONT)  # nsenter stops with its child
        if victim != "here":
            got = copy.wait()
            assert got.code in (6, 7, 69), got.errors
    scene.is_clean()


@pytest.mark.parametrize(
    ("way", "victim"), [("push", "there"), ("pull", "here"), ("push", "lane"), ("pull", "lane")]
)
def test_a_kill_in_the_first_pass_leaves_no_target_on_either_host(
    scene: Scene, way: str, victim: str
) -> None:
    here, there = (scene.lab.a, scene.lab.b) if way == "push" else (scene.lab.b, scene.lab.a)
    places = (
        (scene.device, "b:/srv/vdb.img") if way == "push" else (f"a:{scene.device}", "/srv/vdb.img")
    )
    # The agent may take a host that was killed for one that comes again.
    retry = "0" if victim == "lane" else "5"
    copy = Running(here, *places, "--bwlimit", "512K", "--retry", retry)
    try:
        wait_until(lambda: copy.in_phase("first pass"), "the first pass", SECONDS)
        pid = {
            "here": lambda: scene.pid(here, "copy"),
            "there": lambda: scene.pid(there, "copy-agent"),
            "lane": lambda: scene.pid(here, "ssh pyploop copy-lane"),
        }[victim]()
        os.kill(pid, signal.SIGKILL)
        if victim != "here":
            got = copy.wait()
            assert got.code == 69, got.errors
            assert ("for the data was lost" in got.errors) == (victim == "lane")
            assert f"the connection to {there.name} " in got.errors
    finally:
        end(copy.process)
    scene.is_clean()


@pytest.mark.parametrize("way", telling(["push", "pull"], 0))
def test_a_further_lane_that_is_killed_costs_only_itself_and_is_replaced(
    scene: Scene, way: str
) -> None:
    here, there = (scene.lab.a, scene.lab.b) if way == "push" else (scene.lab.b, scene.lab.a)
    places = (
        (scene.device, "b:/srv/vdb.img") if way == "push" else (f"a:{scene.device}", "/srv/vdb.img")
    )
    target = scene.lab.b.folder / "srv/vdb.img"
    check = comparison(scene.image, target, SIZE)
    # Else none would be opened while other tests keep the CPUs busy.
    program = (
        "from pyploop.diskcopy import lane_policy; lane_policy.IDLE = 0.0; "
        "from pyploop.cli.main import main; main()"
    )
    copy = Running(
        here, *places, "--bwlimit", "3M", "--before-thaw", check,
        program=(sys.executable, "-c", program),
    )  # fmt: skip
    try:
        first = f"Lane 1 to {there.name} takes part"
        wait_until(lambda: first in copy.out.read_text(), "a second lane", SECONDS)
        assert copy.in_phase("first pass")
        os.kill(scene.pids(here, "ssh pyploop copy-lane")[1], signal.SIGKILL)
        # As long as so much is written, the copy does not end.
        again = f"Lane 2 to {there.name} takes part"
        wait_until(lambda: again in copy.out.read_text(), "another lane", SECONDS)
        scene.ends_writing()
        got = copy.wait()
    finally:
        end(copy.process)
    assert got.code == 0, got.errors
    assert f"Lane 1 to {there.name} was lost" in got.errors
    assert "Lane 1 has ended" in got.errors
    assert got.event("summary")["acknowledged"] == "acknowledged"
    assert got.event("received")["root"] == got.event("summary")["root"]
    target.unlink()
    scene.is_clean()


@pytest.mark.parametrize(("way", "what"), [("push", "copy-lane"), ("pull", "copy-")])
def test_a_lost_connection_is_bridged_and_the_copy_ends_as_any_other(
    scene: Scene, way: str, what: str
) -> None:
    here = scene.lab.a if way == "push" else scene.lab.b
    places = (
        (scene.device, "b:/srv/vdb.img") if way == "push" else (f"a:{scene.device}", "/srv/vdb.img")
    )
    target = scene.lab.b.folder / "srv/vdb.img"
    check = comparison(scene.image, target, SIZE)
    copy = Running(here, *places, "--bwlimit", "3M", "--before-thaw", check)
    try:
        wait_until(lambda: copy.in_phase("first pass"), "the first pass", SECONDS)
        time.sleep(1)
        for name in ("ssh pyploop copy-lane", "ssh pyploop copy-agent"):
            for pid in scene.pids(here, name) if what in name else []:
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: '"bridged"' in copy.log.read_text(), "another connection", SECONDS)
        scene.ends_writing()
        got = copy.wait()
    finally:
        end(copy.process)
    assert got.code == 0, got.errors
    summary = got.event("summary")
    assert (summary["cuts"], summary["acknowledged"]) == (1, "acknowledged"), got.errors
    assert summary["completeness"] == "complete" and not is_frozen(scene.point)
    assert got.event("received")["root"] == summary["root"]
    target.unlink()
    scene.is_clean()


@pytest.mark.parametrize("way", ["push", "pull"])
def test_a_signal_undoes_the_copy_on_both_hosts(scene: Scene, way: str) -> None:
    here = scene.lab.a if way == "push" else scene.lab.b
    places = (
        (scene.device, "b:/srv/vdb.img") if way == "push" else (f"a:{scene.device}", "/srv/vdb.img")
    )
    copy = Running(here, *places, "--bwlimit", "512K")
    try:
        wait_until(lambda: copy.in_phase("first pass"), "the first pass", SECONDS)
        os.kill(scene.pid(here, "copy"), signal.SIGINT)
        got = copy.wait()
    finally:
        end(copy.process)
    assert got.code == 128 + signal.SIGINT or got.code == -signal.SIGINT, got.errors
    there = scene.lab.b if way == "push" else scene.lab.a
    assert "everything was undone here" in got.errors
    assert f"everything was undone on {there.name}, too" in got.errors
    scene.is_clean()


def test_a_peer_that_stands_still_is_given_up_after_the_timeout(scene: Scene) -> None:
    copy = Running(scene.lab.a, scene.device, "b:/srv/vdb.img", "--bwlimit", "2M", "--timeout", "2")
    stopped = None
    try:
        wait_until(lambda: copy.in_phase("first pass"), "the first pass", SECONDS)
        stopped = scene.pid(scene.lab.b, "copy-agent")
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: "to undo its part" in copy.out.read_text(), "it gives up", SECONDS)
        os.kill(stopped, signal.SIGCONT)
        got = copy.wait()
        assert got.code == 7, got.errors
        assert "--timeout" in got.errors
    finally:
        if stopped is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGCONT)
        end(copy.process)
    scene.is_clean()


# ---- what the other host is asked for


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        ("--read {device}", ("a:{device}", "/srv/got"), 0),
        ("--read /dev", ("a:{device}", "/srv/got", "-F", "touch /srv/evil"), 38),
    ],
)
def test_a_key_with_a_command_copies_what_the_command_allows(
    scene: Scene, options: str, words: tuple[str, ...], code: int
) -> None:
    a, b = scene.lab.a, scene.lab.b
    key = (scene.lab.folder / "key.pub").read_text()
    command = f"pyploop copy-agent {options.format(device=scene.device)}"
    keys = a.folder / "restricted"
    keys.write_text(f'restrict,command="{command}" {key}')
    config = (a.folder / "sshd_config").read_text()
    (a.folder / "sshd2").write_text(
        config.replace(
            f"AuthorizedKeysFile {scene.lab.folder / 'key.pub'}", f"AuthorizedKeysFile {keys}"
        ).replace("ListenAddress", "Port 2222\nListenAddress")
    )
    daemon = subprocess.Popen(
        a.command("/usr/sbin/sshd", "-D", "-e", "-f", a.folder / "sshd2"),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    known = (scene.lab.folder / "known_hosts").read_text().splitlines()[0].split(" ", 1)
    (scene.lab.folder / "known2").write_text(f"[{known[0]}]:2222 {known[1]}\n")
    try:
        wait_until(lambda: a.run("ss", "-Htln", "sport = :2222"), "sshd")
        ssh = f"-p 2222 -oUserKnownHostsFile={scene.lab.folder / 'known2'}"
        got = Running(b, *(w.format(device=scene.device) for w in words), "--ssh", ssh).wait()
    finally:
        for pid, line in a.processes().items():
            if "sshd2" in line:
                a.run("kill", pid, check=False)
        end(daemon)
    assert got.code == code, got.errors
    if code:
        assert "may not" in got.errors
    assert (b.folder / "srv/got").exists() == (code == 0)
    assert not (a.folder / "srv/evil").exists() and not (a.folder / "srv/got").exists()
    (b.folder / "srv/got").unlink(missing_ok=True)
    scene.is_clean()
