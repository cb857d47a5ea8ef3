# SPDX-License-Identifier: Apache-2.0
"""The lab's hosts with Podman: each has its own storage, its own state and the same network,
whose bridge is the host's.  The container has the address that the client knows."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import missing, needs

from lab import container, requirements
from lab.hosts import CONTAINER_IP, CONTAINER_MAC, NET, Host, Lab

NAME = "ct"
POD, INFRA, PEER = "together", "together-infra", "peer"
COUNTING = "n=0; while sleep 0.05; do n=$((n+1)); echo line $n; done"
IMAGE = "guest:1"
VOLUME = "data"
STORAGE = Path("/var/lib/containers/storage")
ULIMITS = ("--ulimit", "nofile=20000:20000", "--ulimit", "nproc=10000:10000")
"""Podman raises these limits, and where root lacks CAP_SYS_RESOURCE runc then fails."""
LINK = ("--network", "lan", "--ip", CONTAINER_IP, "--mac-address", CONTAINER_MAC)
_NETWORK = {
    "name": "lan",
    "id": "1" * 64,
    "driver": "bridge",
    "network_interface": "br0",
    "created": "2026-01-01T00:00:00Z",
    "subnets": [{"subnet": f"{NET}.0/24", "gateway": f"{NET}.254"}],
    "ipv6_enabled": False,
    "internal": False,
    "dns_enabled": False,
    "ipam_options": {"driver": "host-local"},
}
CONFIG = f"""
[trust]
live = ["{NET}.0/24"]

[remote]
agent = ["pyploop", "agent", "--config", "{container.PYPLOOP_CONFIG}"]
"""


def check() -> None:
    """Skip the test where there can be no such lab; with CI=true that is a failure."""
    requirements.check()
    needs("podman", "nft", "tar", "busybox")
    if not Path("/usr/lib/podman/netavark").exists():
        missing("needs netavark (Debian package netavark)")


def prepare(host: Host) -> None:
    """Podman's own places, and the network."""
    script = "mkdir -p /etc/containers/networks && mount -t tmpfs tmpfs /etc/containers/networks"
    host.run("sh", "-ec", script)
    # Else the bridge takes the lowest address of its ports, which come and go with containers,
    # and the other host looks for this one at an address that is gone.
    last = int(host.address.rpartition(".")[2])
    host.run("ip", "link", "set", "br0", "address", f"02:00:0a:4d:01:{last:02x}")
    network = host.outside("/etc/containers/networks/lan.json")
    network.write_text(json.dumps(_NETWORK))
    host.outside(container.PYPLOOP_CONFIG).write_text(CONFIG)


def import_image(host: Host, guest: Path, tag: str = IMAGE) -> None:
    """An image with the guest, and a file that the container can change."""
    archive = host.folder / "image.tar"
    with tarfile.open(archive, "w") as tar:
        for folder in ("data", "tmp", "etc"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        tar.add(guest, "guest")
        if busybox := shutil.which("busybox"):
            tar.add(busybox, "bin/busybox")
            for name in ("sh", "sleep", "cat", "rm", "ls"):
                entry = tarfile.TarInfo(f"bin/{name}")
                entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(entry)
        note = tarfile.TarInfo("etc/note")
        note.size = 6
        tar.addfile(note, io.BytesIO(b"image\n"))
    host.run("podman", "import", "--quiet", archive, tag)


def start(host: Host, *options: str, name: str = NAME, memory: int = 0, script: str = "") -> None:
    """Run the guest, or a script of the shell, as a user types it."""
    words = ["podman", "run", "--detach", "--name", name, *ULIMITS, *options, IMAGE]
    command = ["sh", "-c", script] if script else ["/guest", "5", str(memory >> 20)]
    host.run(*words, *command)


def remove_containers(host: Host) -> None:
    """All of Podman's containers of the host, with their pods."""
    host.run("podman", "pod", "rm", "--all", "--force", "--time", "0", check=False)
    for _ in range(3):  # one on which another depends stays until that one is gone
        host.run("podman", "rm", "--all", "--force", "--time", "0", check=False)
        if not host.run("podman", "ps", "--all", "--quiet").strip():
            break


def remove(host: Host) -> None:
    """All of Podman's containers and volumes of the host."""
    remove_containers(host)
    host.run("podman", "volume", "rm", "--all", "--force", check=False)
    for mount in reversed(host.mounts()):
        if mount.startswith(str(STORAGE)):
            host.run("umount", "--lazy", mount, check=False)


@contextlib.contextmanager
def hosts_with_podman(lab: Lab) -> Iterator[Path]:
    """Both hosts; the guest's program."""
    guest = container.build_guest(lab.folder)
    with contextlib.ExitStack() as stack:
        for host in (lab.a, lab.b):
            prepare(host)
            stack.callback(remove, host)
        yield guest


@contextlib.contextmanager
def running(lab: Lab, *options: str, memory: int = 0) -> Iterator[None]:
    """The container, running on host a with the client's address and its data in a volume."""
    with hosts_with_podman(lab) as guest:
        import_image(lab.a, guest)
        start(lab.a, *LINK, "--volume", f"{VOLUME}:/data", *options, memory=memory)
        yield


def start_pod(host: Host, *options: str, link: tuple[str, ...] = LINK) -> None:
    """A pod of two: the guest, with the client's address and its data in a volume, and a shell
    that counts.  options: for both."""
    host.run("podman", "pod", "create", "--name", POD, "--infra-name", INFRA, *link)
    start(host, "--pod", POD, "--volume", f"{VOLUME}:/data", *options)
    start(host, "--pod", POD, *options, name=PEER, script=COUNTING)


@contextlib.contextmanager
def running_pod(lab: Lab, *options: str) -> Iterator[None]:
    """The pod, running on host a."""
    with hosts_with_podman(lab) as guest:
        import_image(lab.a, guest)
        start_pod(lab.a, *options)
        yield


# ---- what there is


def inspect(host: Host, kind: str = "container", name: str = NAME) -> dict[str, Any]:
    (found,) = json.loads(host.run("podman", kind, "inspect", name))
    return dict(found)


def states(host: Host) -> dict[str, str]:
    """Name -> what `podman ps` says of it, infra containers included."""
    found = json.loads(host.run("podman", "ps", "--all", "--format", "json"))
    return {one["Names"][0]: str(one["State"]) for one in found}


def volumes(host: Host) -> list[str]:
    return host.run("podman", "volume", "ls", "--format", "{{.Name}}").split()


def images(host: Host) -> list[str]:
    return host.run("podman", "images", "--no-trunc", "--quiet").split()
