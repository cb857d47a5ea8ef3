# SPDX-License-Identifier: Apache-2.0
"""Two hosts of vzhost.py in one folder, and an ssh between them that is a shell."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import support

from pyploop.migration.source import host_rates

CTID = "101"
_SSH = """#!{python}
# As ssh: options, --, host, one command for the login shell there, which sees the
# connection's end when this process ends.
import os, subprocess, sys, threading

host, command = sys.argv[sys.argv.index("--") + 1 :]
if host == "nowhere":
    print("ssh: connect to host nowhere: No route to host", file=sys.stderr)
    sys.exit(255)
os.write(1, b"Welcome to " + host.encode() + b"\\n")
shell = subprocess.Popen(
    ["sh", "-c", "exec " + command], stdin=-1, stdout=-1, start_new_session=True
)


def forward(source, to):
    while data := os.read(source, 1 << 16):
        while data:
            data = data[os.write(to, data) :]
    os.close(to)


threading.Thread(target=forward, args=(0, shell.stdin.fileno()), daemon=True).start()
forward(shell.stdout.fileno(), 1)
os._exit(shell.wait())
"""
_PROGRAM = f"""#!{sys.executable}
import sys

sys.path.insert(0, {str(Path(__file__).parent)!r})
import vzhost

sys.exit(vzhost.main())
"""
_DESCRIPTOR = """<?xml version="1.0"?>
<Parallels_disk_image Version="1.0">
  <Disk_Parameters><Disk_size>{sectors}</Disk_size></Disk_Parameters>
  <StorageData><Storage>
    <Start>0</Start><End>{sectors}</End><Blocksize>2048</Blocksize>
    <Image><GUID>{guid}</GUID><Type>Plain</Type><File>root.hds</File></Image>
  </Storage></StorageData>
  <Snapshots><TopGUID>{guid}</TopGUID>
    <Shot><GUID>{guid}</GUID><ParentGUID>{{00000000-0000-0000-0000-000000000000}}</ParentGUID></Shot>
  </Snapshots>
</Parallels_disk_image>
"""
GUID = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
DESCRIPTOR = _DESCRIPTOR.format(sectors=48 << 11, guid=GUID)


@dataclass(frozen=True)
class VzHost:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def vzctl(self, *words: str, check: bool = True) -> str:
        return support.run(self.folder / "bin/vzctl", *words, check=check)

    def status(self) -> str:
        """The last words of its line: 'running', 'running suspended', 'down'."""
        return " ".join(self.vzctl("status", CTID).split()[4:])

    def exists(self) -> bool:
        return self.vzctl("status", CTID).split()[2] == "exist"

    def fail(self, step: str, action: str | int, when: str = "before", number: int = 0) -> None:
        """See vzhost.py.  number: of the step's calls from now on; 0: each."""
        state = self.folder / "state"
        if number:
            number += self.steps().count(step)
        wish = {"step": step, "action": str(action), "when": when, "number": number}
        if action == "gate":
            (state / "gate").touch()
        with (state / "faults").open("a") as f:
            f.write(json.dumps(wish) + "\n")

    def reached(self) -> bool:
        """The gate that `fail` has closed."""
        return (self.folder / "state/gate.reached").exists()

    def open_gate(self) -> None:
        for name in ("gate", "gate.reached"):
            (self.folder / "state" / name).unlink(missing_ok=True)

    def mend(self) -> None:
        for name in ("faults", "happened"):
            (self.folder / "state" / name).unlink(missing_ok=True)
        self.open_gate()

    def steps(self) -> list[str]:
        """All that was called, the tests' own questions included."""
        return self._lines("steps")

    def happened(self) -> list[str]:
        """Steps at which something went wrong, since `mend`."""
        return self._lines("happened")

    def _lines(self, name: str) -> list[str]:
        path = self.folder / "state" / name
        return path.read_text().splitlines() if path.exists() else []

    def calls(self) -> list[str]:
        """Commands that were given, without the many questions."""
        return [x for x in self._lines("calls") if x.startswith("vzctl") and " status " not in x]

    def numbers(self) -> list[int]:
        return [int(n) for n in (self.folder / f"root/{CTID}/numbers").read_text().split()]

    def files(self) -> set[str]:
        """Everything that a migration must not leave, by its path."""
        left = {
            str(p.relative_to(self.folder))
            for top in ("private", "root", "etc/vz/conf", "lock", "images", "varlib")
            for p in (self.folder / top).rglob("*")
            if f"root/{CTID}/" not in str(p)
        }
        left = {p for p in left if not p.startswith("lock/migration.") and p != "varlib/pyploop"}
        return {p for p in left if not p.endswith(host_rates.SUFFIX)}  # what a host has learned


@dataclass(frozen=True)
class VzLab:
    folder: Path
    a: VzHost
    b: VzHost

    def other(self, host: VzHost) -> VzHost:
        return self.b if host is self.a else self.a

    def command(self, source: VzHost, *words: str) -> list[str]:
        config = ["--runtime", "vzctl", "--config", str(source.folder / "migrate.toml")]
        return [*support.pyploop_cmd(), "migrate", *config, *words]

    def migrate(self, source: VzHost, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(source, *words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            env=support.pyploop_env(),
        )

    def loops(self) -> list[str]:
        lines = support.run("losetup", "-nO", "BACK-FILE").splitlines()
        return [x for x in lines if str(self.folder) in x]


def make_host(folder: Path, peer: Path) -> VzHost:
    """A host that trusts its peer, by the name of its folder."""
    for name in ("bin", "etc/vz/conf", "private", "root", "lock", "state", "images", "varlib"):
        (folder / name).mkdir(parents=True)
    for name in ("vzctl", "vzlist", "vzcptcheck", "ploop"):
        (folder / "bin" / name).write_text(_PROGRAM)
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin/ssh").write_text(_SSH.format(python=sys.executable))
    (folder / "bin/ssh").chmod(0o755)
    (folder / "etc/vz/vz.conf").write_text(
        f'VE_ROOT={folder}/root/$VEID\nVE_PRIVATE="{folder}/private/${{VEID}}"\n'
        f"LOCKDIR={folder}/lock\nDUMPDIR={folder}/dump\n# A comment\ntouch {folder}/executed\n"
    )
    agent = [*support.pyploop_cmd(), "agent", "--config", str(peer / "migrate.toml")]
    agent += ["--source", folder.name]
    (folder / "migrate.toml").write_text(
        f'state_dir = "{folder}/varlib/pyploop"\nlock_dir = "{folder}/lock"\n'
        f'images_dir = "{folder}/images"\ncommand_timeout = 20\n'
        f'[trust]\nlive = ["{peer.name}"]\n[policy]\naction_scripts = true\n[remote]\n'
        f'ssh = ["{folder}/bin/ssh"]\nagent = {json.dumps(agent)}\n[vzctl]\n'
        f'etc = "{folder}/etc/vz"\n'
        + "".join(
            f'{key} = "{folder}/bin/{program}"\n'
            for key, program in (
                ("command", "vzctl"),
                ("vzlist", "vzlist"),
                ("vzcptcheck", "vzcptcheck"),
                ("ploop", "ploop"),
            )
        )
    )
    return VzHost(folder)


def _make_disk(private: Path, size: int) -> None:
    hdd = private / "root.hdd"
    hdd.mkdir()
    with (hdd / "root.hds").open("wb") as f:
        f.truncate(size)
    # A journal of 4 MiB would be another one after some time, and no file is as large.
    support.run("mkfs.ext4", "-q", "-F", "-J", "size=1", hdd / "root.hds")
    (hdd / "DiskDescriptor.xml").write_text(_DESCRIPTOR.format(sectors=size >> 9, guid=GUID))


def _make_tree(private: Path) -> None:
    (private / "etc").mkdir()
    (private / "etc/hostname").write_text("web\n")
    os.link(private / "etc/hostname", private / "etc/second")
    os.chown(private / "etc/hostname", 1000, 1000)
    (private / "link").symlink_to("/etc/passwd")


@contextlib.contextmanager
def vz_lab(folder: Path, size: int = 48 << 20, *, simfs: bool = False) -> Iterator[VzLab]:
    """The container runs on a; simfs: its private area is its root."""
    a, b = make_host(folder / "a", folder / "b"), make_host(folder / "b", folder / "a")
    private = a.folder / "private" / CTID
    private.mkdir(parents=True)
    (a.folder / "root" / CTID).mkdir()
    if simfs:
        _make_tree(private)
    else:
        _make_disk(private, size)
    (private / ".ve.layout").symlink_to("5")
    (a.folder / f"etc/vz/conf/{CTID}.conf").write_text(
        'NAME="web"\nIP_ADDRESS="10.1.2.3"\nOSTEMPLATE="debian-12"\n'
    )
    (a.folder / f"etc/vz/conf/{CTID}.mount").write_text("#!/bin/sh\n")
    lab = VzLab(folder, a, b)
    try:
        a.vzctl("start", CTID)
        support.wait_until((a.folder / f"root/{CTID}/numbers").exists, "the guest runs")
        support.wait_until(lambda: len(a.numbers()) > 2, "the guest counts")
        yield lab
    finally:
        for host in (a, b):
            host.mend()
            host.vzctl("--skiplock", "chkpnt", CTID, "--kill", check=False)
            subprocess.run(
                ["umount", str(host.folder / "root" / CTID)], capture_output=True, check=False
            )
        for line in support.run("losetup", "-nO", "NAME,BACK-FILE").splitlines():
            if str(folder) in line:
                support.run("losetup", "--detach", line.split()[0], check=False)


def runs_only_on(lab: VzLab, host: VzHost, clean: bool = True) -> None:
    """On this host, having lost and repeated no number; nothing on the other."""
    other = lab.other(host)
    assert host.status() == "running"
    assert other.status() == "down"
    before = len(host.numbers())
    support.wait_until(lambda: len(host.numbers()) > before, "it counts on")
    numbers = host.numbers()
    assert numbers == list(range(len(numbers)))
    if clean:
        assert other.files() == set()
        assert not [p for p in host.files() if p.startswith(("lock", "images", "varlib"))]
        assert lab.loops() == [str(host.folder / f"private/{CTID}/root.hdd/root.hds")]
