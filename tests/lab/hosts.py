# SPDX-License-Identifier: Apache-2.0
"""Two hosts on one kernel, each with its own sshd, and the network between them.

    client ── lan (bridge) ──┬── br0 of host a ── ct0 ── eth0 of a's container
                             └── br0 of host b ── ct0 ── eth0 of b's container

A host is a set of namespaces (network, mounts, processes, cgroups, host name), so
that both hosts use the same paths, container names and cgroup names, as two
machines would.  Its /run, /dev/shm, /srv and /var/lib are its own.  Everything ends
with the host's process 1, which dies with the process that made it: even SIGKILL
of the test leaves only empty cgroups and one folder.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import criu

CGROUPS = Path("/sys/fs/cgroup")
NET = "10.77.0"
CLIENT_IP, CONTAINER_IP = f"{NET}.1", f"{NET}.100"
CONTAINER_MAC = "02:00:0a:4d:00:64"
CONTAINER_NETNS = "/run/netns/ct"
"""The container's network namespace, the same name on each host."""
SLOWNESS = int(os.environ.get("PYPLOOP_SLOWNESS", "1"))
"""How many times slower this machine is than a usual one (emulated)."""
READY_SECONDS = 20.0 * SLOWNESS
_SLEEP = "sleep 86400"


def run(command: Sequence[str], timeout: float = 60, check: bool = True) -> str:
    """Stdout of a command; RuntimeError with its stderr when it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.returncode}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Host:
    """A host of the lab."""

    name: str
    address: str
    folder: Path
    """Outside: what its /srv and /var/lib are, its sshd's files and log."""
    pid: int
    """Its process 1, as seen outside."""
    cgroup: str
    """Its root, below each hierarchy's."""

    def command(self, *words: object) -> list[str]:
        """The command that runs `words` on this host."""
        return [str(self.folder / "enter"), *(str(w) for w in words)]

    def run(self, *words: object, timeout: float = 60, check: bool = True) -> str:
        return run(self.command(*words), timeout, check)

    def outside(self, path: str | Path) -> Path:
        """A path on this host as the test sees it, mounts included."""
        return Path(f"/proc/{self.pid}/root") / str(path).lstrip("/")

    def processes(self) -> dict[int, str]:
        """Command lines on this host, without those that are always there."""
        lines = self.run("ps", "-eo", "pid=,args=", "ww").splitlines()
        found = {int(words[0]): words[1] for x in lines if len(words := x.split(None, 1)) == 2}
        mine = ("sshd: /usr/sbin/sshd -D", "ps -eo pid=,args= ww", _SLEEP)
        return {p: a for p, a in found.items() if p != 1 and not a.startswith(mine)}

    def mounts(self) -> list[str]:
        """Mount points on this host."""
        text = os.fsdecode(self.outside("/proc/1/mounts").read_bytes())
        return [line.split()[1] for line in text.splitlines()]


@dataclass(frozen=True)
class Lab:
    """Client and two hosts."""

    folder: Path
    a: Host
    b: Host
    client_pid: int

    def other(self, host: Host) -> Host:
        return self.b if host is self.a else self.a

    def on_client(self, *words: object) -> list[str]:
        """The command that runs `words` in the client's network."""
        return ["nsenter", f"--net=/proc/{self.client_pid}/ns/net", *(str(w) for w in words)]


@contextlib.contextmanager
def lab(parent: Path | None = None, deadlines: str = "") -> Iterator[Lab]:
    """The whole lab in a new folder (on a disk: images lie in it).  deadlines: those of both
    hosts' pyploop that are other ones (slowly.py)."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="pyploop-lab-", dir=parent))
        stack.callback(_remove_tree, folder)
        client = stack.enter_context(_namespaces(["--net"], _CLIENT))
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")])
        (folder / "ssh_config").touch()
        hosts = []
        for name, last in (("a", 11), ("b", 12)):
            hosts.append(
                stack.enter_context(_host(folder, name, f"{NET}.{last}", client, deadlines))
            )
        _write_ssh_config(folder, hosts)
        yield Lab(folder, hosts[0], hosts[1], client)


_CLIENT = f"""
ip link set lo up
ip link add lan type bridge
ip addr add {CLIENT_IP}/24 dev lan
ip link set lan up
"""

_HOST = """
# Copies of other people's mounts would keep their devices and namespaces busy.
tac /proc/self/mountinfo | while read -r _ _ _ _ at _ rest; do
  case "$at ${{rest#*- }}" in
    /run/*|/dev/shm*|*' /dev/loop'*|*' nsfs '*) umount -l "$at" || : ;;
  esac
done
mkdir -p {folder}/srv {folder}/var-lib
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir -p /run/lock /run/sshd /run/netns
mount --bind {folder}/srv /srv
mount --bind {folder}/var-lib /var/lib
mount --bind {folder}/../ssh_config /etc/ssh/ssh_config
mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
for c in {controllers}; do
  mkdir /sys/fs/cgroup/$c
  case $c in
    unified) mount -t cgroup2 cgroup2 /sys/fs/cgroup/$c ;;
    systemd) mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/$c ;;
    *) mount -t cgroup -o $c cgroup /sys/fs/cgroup/$c ;;
  esac
done
hostname {name}
ip link set lo up
ip link add br0 type bridge
ip link set up0 master br0
ip link set up0 up
ip addr add {address}/24 dev br0
ip link set br0 up
ip netns add ct
ip link add ct0 type veth peer name eth0 netns ct
ip link set ct0 master br0
nsenter --net=/run/netns/ct sh -ec '
  ip link set lo up
  ip link set eth0 address {mac} up
  ip addr add {container}/24 dev eth0'
"""


def uplink(name: str, client: int) -> list[str]:
    """The command that connects a host's namespace ($PID) with the client's bridge."""
    wire = (
        f"ip link add to-{name} type veth peer name up0 netns $PID;"
        f"ip link set to-{name} master lan; ip link set to-{name} up"
    )
    return ["nsenter", f"--net=/proc/{client}/ns/net", "sh", "-ec", wire]


def joining(cgroup: str, controllers: Iterable[str]) -> str:
    """Lines of a shell script that then runs in the cgroup."""
    return "".join(f"echo $$ >{CGROUPS}/{c}/{cgroup}/cgroup.procs\n" for c in controllers)


@contextlib.contextmanager
def _host(folder: Path, name: str, address: str, client: int, deadlines: str) -> Iterator[Host]:
    own = folder / name
    own.mkdir()
    cgroup = f"{folder.name}-{name}"
    with _cgroup(cgroup) as controllers, contextlib.ExitStack() as stack:
        script = _HOST.format(
            folder=shlex.quote(str(own)),
            controllers=" ".join(controllers),
            name=name,
            address=address,
            mac=CONTAINER_MAC,
            container=CONTAINER_IP,
        )
        kinds = ["--net", "--mount", "--uts", "--cgroup", "--propagation=private", "--mount-proc"]
        join = joining(cgroup, controllers)
        pid = stack.enter_context(_namespaces(kinds, script, join, uplink(name, client)))
        path = f"PATH={shlex.quote(str(own))}/bin:$PATH"
        enter = f"nsenter --target={pid} --net --mount --uts --cgroup --pid"
        _script(own / "enter", f'{join}{path} exec {enter} "$@"\n')
        host = Host(name, address, own, pid, cgroup)
        stack.enter_context(_sshd(host, folder / "key.pub", deadlines))
        yield host


@contextlib.contextmanager
def _namespaces(
    kinds: Sequence[str], script: str, join: str = "", uplink: Sequence[str] = ()
) -> Iterator[int]:
    """New namespaces (one of processes always), set up by a script; process 1 of them.

    `join` runs before; the command `uplink` when the namespaces are there, with $PID.
    """
    # As process 1 the shell reaps what its host's processes leave.
    inner = f"set -e; echo up; read go; {script}\necho ready; while :; do {_SLEEP}; done"
    words = ["unshare", "--pid", "--fork", "--kill-child", *kinds]
    outer = f"{join}exec {shlex.join(words)} sh -c {shlex.quote(inner)}"
    holder = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "sh", "-c", outer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin and holder.stdout and holder.stderr
    try:
        if holder.stdout.readline() != "up\n":
            raise RuntimeError(f"no namespaces: {holder.stderr.read()}")
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text()
        pid = int(children.split()[0])
        run([word.replace("$PID", str(pid)) for word in uplink] or ["true"])
        holder.stdin.write("go\n")
        holder.stdin.flush()
        if holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"the set-up failed: {holder.stderr.read()}")
        yield pid
    finally:
        holder.kill()
        holder.communicate()


@contextlib.contextmanager
def _cgroup(name: str) -> Iterator[list[str]]:
    """A cgroup in each hierarchy; the hierarchies' folders."""
    hierarchies = sorted(d.name for d in CGROUPS.iterdir() if (d / "cgroup.procs").exists())
    made = []
    try:
        for h in hierarchies:
            d = CGROUPS / h / name
            d.mkdir()
            made.append(d)
            if h == "cpuset":
                for f in ("cpuset.cpus", "cpuset.mems"):
                    (d / f).write_text((CGROUPS / h / f).read_text())
        yield hierarchies
    finally:
        for d in made:
            _remove_cgroup(d)


def _remove_cgroup(top: Path) -> None:
    """Remove a tree of cgroups; what still runs in it is one of ours: kill it."""
    deadline = time.monotonic() + READY_SECONDS
    while top.exists():
        for d in sorted((p for p in [top, *top.rglob("*")] if p.is_dir()), reverse=True):
            state = d / "freezer.state"
            with contextlib.suppress(OSError):
                if state.exists():
                    state.write_text("THAWED")
                for pid in (d / "cgroup.procs").read_text().split():
                    os.kill(int(pid), 9)
                d.rmdir()
        if top.exists() and time.monotonic() > deadline:
            raise RuntimeError(f"{top} cannot be removed")
        time.sleep(0.01)


# ---- ssh

_SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {authorized}
PidFile none
StrictModes no
UsePAM no
UseDNS no
PermitRootLogin yes
PasswordAuthentication no
MaxStartups 100
Subsystem sftp internal-sftp
SetEnv PATH={folder}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
"""


@contextlib.contextmanager
def _sshd(host: Host, key: Path, deadlines: str) -> Iterator[None]:
    folder = host.folder
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")])
    config = folder / "sshd_config"
    config.write_text(_SSHD.format(address=host.address, folder=folder, authorized=key))
    (folder / "bin").mkdir()
    (folder / "bin" / "criu").symlink_to(criu.program() or "/nonexistent")
    python = f"exec {shlex.quote(sys.executable)}"
    if SLOWNESS == 1 and not deadlines:
        _script(folder / "bin" / "pyploop", f'{python} -m pyploop.cli.main "$@"\n')
    else:
        changed = f"PYPLOOP_SLOWNESS={SLOWNESS} PYPLOOP_DEADLINES={shlex.quote(deadlines)}"
        slowly = f"{changed} {python} {Path(__file__).with_name('slowly.py')}"
        _script(folder / "bin" / "pyploop", f'{slowly} pyploop.cli.main "$@"\n')
    with (folder / "sshd.log").open("wb") as log:
        # Dies with the host; waited for here so that it can say why it did not start.
        daemon = subprocess.Popen(
            host.command("/usr/sbin/sshd", "-D", "-e", "-f", config),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not host.run("ss", "-Htln", "sport = :22"):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"sshd: {(folder / 'sshd.log').read_text()}")
            time.sleep(0.01)
        yield
    finally:
        daemon.kill()
        daemon.wait()


def _write_ssh_config(folder: Path, hosts: Sequence[Host]) -> None:
    """What is /etc/ssh/ssh_config on both hosts."""
    known = folder / "known_hosts"
    keys = [(h, (h.folder / "host_key.pub").read_text().split()) for h in hosts]
    known.write_text("".join(f"{h.address} {kind} {key}\n" for h, (kind, key, *_) in keys))
    shared = (
        f"Host *\n  IdentityFile {folder}/key\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {known}\n  StrictHostKeyChecking yes\n"
    )
    names = "".join(f"Host {h.name}\n  HostName {h.address}\n" for h in hosts)
    (folder / "ssh_config").write_text(names + shared)


# ---- small things


def _script(path: Path, text: str) -> None:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def _remove_tree(folder: Path) -> None:
    run(["rm", "-rf", "--one-file-system", str(folder)], timeout=600)  # gigabytes, on a busy disk
