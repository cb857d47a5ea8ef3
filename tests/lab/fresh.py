# SPDX-License-Identifier: Apache-2.0
"""Two hosts as lab/hosts.py has them, but each with a Debian of its own, in which nothing is
installed yet but sshd.  Nothing of this checkout, and no program of this machine, is seen
there.  root of `a` can log in on `b`."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support import ROOT

from lab import hosts
from lab.hosts import NET, run

MIRROR = os.environ.get("PYPLOOP_DEBIAN_MIRROR", "http://deb.debian.org/debian")
SUITE = os.environ.get("PYPLOOP_DEBIAN_SUITE", "bookworm")
SOURCE = "/root/pyploop"
"""Where the source tree is on each host."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PIP = {k: v for k, v in os.environ.items() if k in ("PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT")}
_CERTIFICATES = Path(os.environ.get("PIP_CERT", "/etc/ssl/certs/ca-certificates.crt"))

_BOOT = """
mount --rbind {root} {root}
cd {root}
for folder in dev sys; do mount --rbind /$folder $folder; done
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
for c in {controllers}; do
  mkdir sys/fs/cgroup/$c
  case $c in
    unified) mount -t cgroup2 cgroup2 sys/fs/cgroup/$c ;;
    systemd) mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/$c ;;
    *) mount -t cgroup -o $c cgroup sys/fs/cgroup/$c ;;
  esac
done
mkdir -p run/sshd run/lock mnt
hostname {name}
ip link set lo up
ip link add br0 type bridge
ip link set br0 address 02:00:0a:4d:01:{last:02x} up
ip link set up0 master br0
ip link set up0 up
ip addr add {address}/24 dev br0
pivot_root . mnt
umount -l /mnt
"""


@dataclass(frozen=True)
class FreshHost:
    """One of the two."""

    name: str
    address: str
    root: Path
    """Its files, as this machine sees them."""
    folder: Path

    def words(self, *words: object, online: bool = False) -> list[str]:
        """The command that runs these words there as root.  online: in the network of this
        machine, from which packages come; else in the host's."""
        script = "online" if online else "enter"
        return [str(self.folder / script), *(str(w) for w in words)]

    def typed(self, block: str, *, online: bool = False, timeout: float = 900) -> tuple[int, str]:
        """What is typed into root's shell: its status, and what it prints."""
        done = subprocess.run(
            self.words("bash", "-e", "-o", "pipefail", "-c", block, online=online),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def does(self, block: str, *, online: bool = False) -> str:
        """What it prints; AssertionError if it fails."""
        status, output = self.typed(block, online=online)
        assert status == 0, f"{self.name}: {block}\n{output}"
        return output


def make_base(folder: Path) -> Path:
    """A Debian as its installer leaves it, with an sshd."""
    base = folder / "base"
    words = ["debootstrap", "--variant=minbase", "--include=openssh-server"]
    run([*words, SUITE, str(base), MIRROR], timeout=1800)
    shutil.copy("/etc/resolv.conf", base / "etc")
    # Only for pip, and only where a proxy has a certificate of its own.
    shutil.copy(_CERTIFICATES, base / "root" / "certificates.pem")
    listed = run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    )
    for name in listed.split("\0"):
        if name and os.path.lexists(ROOT / name):
            target = Path(f"{base}{SOURCE}", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return base


@contextlib.contextmanager
def two_fresh_hosts(parent: Path) -> Iterator[tuple[FreshHost, FreshHost]]:
    """In a new folder, which is removed."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="pyploop-fresh-", dir=parent))
        stack.callback(hosts._remove_tree, folder)
        client = stack.enter_context(hosts._namespaces(["--net"], hosts._CLIENT))
        base = make_base(folder)
        made = []
        for name, last in (("a", 11), ("b", 12)):
            made.append(stack.enter_context(_host(folder, base, name, last, client)))
        a, b = made
        a.does("mkdir -p -m 700 .ssh; ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519")
        key = a.does("cat .ssh/id_ed25519.pub")
        b.does(f"mkdir -p -m 700 .ssh; echo {shlex.quote(key.strip())} >.ssh/authorized_keys")
        a.does("ssh-keyscan -t ed25519 b >.ssh/known_hosts 2>/dev/null")
        yield a, b


@contextlib.contextmanager
def _host(folder: Path, base: Path, name: str, last: int, client: int) -> Iterator[FreshHost]:
    own = folder / name
    own.mkdir()
    root, address = own / "root", f"{NET}.{last}"
    run(["cp", "-a", str(base), str(root)], timeout=600)
    (root / "etc" / "hostname").write_text(f"{name}\n")
    names = f"127.0.0.1 localhost\n{NET}.11 a\n{NET}.12 b\n"
    (root / "etc" / "hosts").write_text(names)
    with hosts._cgroup(f"{folder.name}-{name}") as controllers, contextlib.ExitStack() as stack:
        script = _BOOT.format(
            root=shlex.quote(str(root)),
            controllers=" ".join(controllers),
            name=name,
            last=last,
            address=address,
        )
        kinds = ["--net", "--mount", "--uts", "--ipc", "--cgroup", "--propagation=private"]
        join = hosts.joining(f"{folder.name}-{name}", controllers)
        pid = stack.enter_context(
            hosts._namespaces(kinds, script, join, hosts.uplink(name, client))
        )
        clean = {"PATH": _PATH, "HOME": "/root", "LC_ALL": "C.UTF-8"}
        pip = {**_PIP, "PIP_CERT": "/root/certificates.pem"}
        for script, net, more in (("enter", "--net", {}), ("online", "", pip)):
            env = shlex.join(f"{k}={v}" for k, v in {**clean, **more}.items())
            enter = f"nsenter --target={pid} {net} --mount --uts --ipc --cgroup --pid"
            # The login's own folder, as for who logs in.
            words = f"exec {enter} /usr/bin/env -i -C /root {env}"
            hosts._script(own / script, f'{join}{words} "$@"\n')
        host = FreshHost(name, address, root, own)
        stack.enter_context(_sshd(host))
        yield host


@contextlib.contextmanager
def _sshd(host: FreshHost) -> Iterator[None]:
    """As Debian configures it."""
    with (host.folder / "sshd.log").open("wb") as log:
        daemon = subprocess.Popen(
            host.words("/usr/sbin/sshd", "-D", "-e"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        host.does("until (: <>/dev/tcp/127.0.0.1/22) 2>/dev/null; do :; done")
        yield
    finally:
        daemon.kill()
        daemon.wait()
