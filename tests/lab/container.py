# SPDX-License-Identifier: Apache-2.0
"""The container that is moved: runc, its root an ext4 on a loop device or a plain
directory, in it the processes of guest.c.  The same paths on each host (hosts.py)."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lab.hosts import CONTAINER_NETNS, NET, Host, Lab, run

NAME = "ct"
BUNDLE = Path("/srv/ct")
IMAGE, ROOTFS = BUNDLE / "root.img", BUNDLE / "rootfs"
CRIU_CONFIG, ACTION = BUNDLE / "criu.conf", Path("/srv/criu-action")
PYPLOOP_CONFIG = "/srv/pyploop.toml"
LINK_UP, LINK_DOWN = "ip link set ct0 up", "ip link set ct0 down"
IMAGE_BYTES = 512 << 20

# The network namespace exists before the container and outlives it, so CRIU must
# not lock it (the lock would stay behind): the link is taken down instead, and comes
# up when the restored sockets are in place and before they speak.  Not at
# `network-unlock`: a dump that leaves the container alive comes by there, too.
_CRIU_CONFIG = f"network-lock skip\naction-script {ACTION}\n"
_ACTION = f"""#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ] || exec {LINK_UP}
"""
_PYPLOOP_CONFIG = f"""
[trust]
live = ["{NET}.0/24"]

[remote]
agent = ["pyploop", "agent", "--config", "{PYPLOOP_CONFIG}"]

[container.{NAME}]
bundle = "{BUNDLE}"
netns = "{CONTAINER_NETNS}"
link_up = {json.dumps(LINK_UP.split())}
link_down = {json.dumps(LINK_DOWN.split())}
"""
_DISK = f"""
[[container.{NAME}.disk]]
image = "{IMAGE}"
mount = "{ROOTFS}"
"""
_TREE = f"""
[[container.{NAME}.tree]]
path = "{ROOTFS}"
"""


def config(append_interval_ms: int, memory: int = 0) -> dict[str, object]:
    """config.json: what `runc spec` writes, but no terminal, no rlimits, a writable
    root, and the network namespace that is already there."""
    spec = tempfile.mkdtemp(prefix="pyploop-spec-")
    try:
        run(["runc", "spec", "--bundle", spec])
        made = json.loads((Path(spec) / "config.json").read_text())
    finally:
        shutil.rmtree(spec)
    made["process"] |= {"terminal": False, "rlimits": [], "cwd": "/"}
    made["process"]["args"] = ["/guest", str(append_interval_ms), str(memory >> 20)]
    made["root"] = {"path": str(ROOTFS), "readonly": False}
    made["hostname"] = NAME
    for namespace in made["linux"]["namespaces"]:
        if namespace["type"] == "network":
            namespace["path"] = CONTAINER_NETNS
    made["annotations"] = {"org.criu.config": str(CRIU_CONFIG)}
    return dict(made)


def build_guest(folder: Path) -> Path:
    """The container's program, statically linked."""
    out = folder / "guest"
    if not out.exists():
        out.write_bytes(_guest())
        out.chmod(0o755)
    return out


@functools.cache
def _guest() -> bytes:
    """Compiled once for all labs of this process."""
    with tempfile.TemporaryDirectory(prefix="pyploop-guest-") as folder:
        out = Path(folder) / "guest"
        source = Path(__file__).with_name("guest.c")
        words = ["gcc", "-O2", "-Wall", "-static", "-o", str(out), str(source)]
        run([*words, "-lsqlite3", "-lm", "-lpthread"], timeout=120)
        return out.read_bytes()


def write_bundle(host: Host, append_interval_ms: int = 5, memory: int = 0) -> None:
    """What a host needs to run the container, except its image."""
    folder = host.outside(BUNDLE)
    host.outside(ROOTFS).mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(append_interval_ms, memory), indent=1))
    host.outside(CRIU_CONFIG).write_text(_CRIU_CONFIG)
    host.outside(ACTION).write_text(_ACTION)
    host.outside(ACTION).chmod(0o755)


def clear_bundle(host: Host) -> None:
    """As before the container was ever on this host: what `pyploop migrate` expects
    of a target, which brings configuration and image."""
    host.run("rm", "-rf", BUNDLE)


def write_pyploop_config(host: Host, tree: bool = False) -> None:
    """How the container looks on this host, for `pyploop migrate` and its agent."""
    host.outside(PYPLOOP_CONFIG).write_text(_PYPLOOP_CONFIG + (_TREE if tree else _DISK))


def on_image(host: Host) -> bool:
    """Whether its root, on this host, is a file system on a loop device."""
    return "disk]]" in host.outside(PYPLOOP_CONFIG).read_text()


def make_root(root: Path, guest: Path) -> None:
    """Fill the folder that becomes the container's root."""
    for folder in ("data", "proc", "dev", "sys", "tmp"):
        (root / folder).mkdir()
    shutil.copy2(guest, root / "guest")


def make_image(host: Host, guest: Path, size: int = IMAGE_BYTES) -> None:
    """The container's disk: a sparse raw image with an ext4 in it."""
    image = host.outside(IMAGE)
    with image.open("wb") as f:
        f.truncate(size)
    with tempfile.TemporaryDirectory(prefix="pyploop-root-") as name:
        root = Path(name)
        make_root(root, guest)
        options = ["-E", "lazy_itable_init=0,lazy_journal_init=0", "-d", str(root)]
        run(["mkfs.ext4", "-q", "-F", *options, str(image)])


def attach(host: Host) -> None:
    """Mount the image on a loop device, which goes when it is unmounted."""
    host.run("mount", "-o", "loop", IMAGE, ROOTFS)


def detach(host: Host) -> None:
    """Undo `attach`; nothing if it is not attached."""
    if str(ROOTFS) in host.mounts():
        host.run("umount", ROOTFS)
    for device in loops(host):
        run(["losetup", "--detach", device], check=False)


def loops(host: Host) -> list[str]:
    """Loop devices on the host's image, whoever attached them."""
    image = host.folder / "srv" / IMAGE.relative_to("/srv")
    if not image.exists():
        return []
    return run(["losetup", "-nO", "NAME", "--associated", str(image)]).split()


def start(host: Host) -> None:
    log, null = host.folder / "run.log", subprocess.DEVNULL
    # Not host.run: the container's processes keep the descriptors they are given.
    done = subprocess.run(
        host.command("runc", "--log", log, "run", "-d", "-b", BUNDLE, NAME),
        stdin=null,
        stdout=null,
        stderr=null,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"runc run: {log.read_text()}")
    host.run("sh", "-c", LINK_UP)


def state(host: Host) -> str:
    """runc's word for the container's state on the host: 'running', 'paused',
    'stopped', or 'absent'."""
    listed = json.loads(host.run("runc", "list", "--format", "json")) or []
    found = [str(c["status"]) for c in listed if c["id"] == NAME]
    return found[0] if found else "absent"


def remove(host: Host) -> None:
    """Kill and remove the container, whatever state it is in."""
    if state(host) == "paused":
        host.run("runc", "resume", NAME, check=False)
    if state(host) != "absent":
        host.run("runc", "delete", "--force", NAME)
    host.run("sh", "-c", LINK_DOWN)


@contextlib.contextmanager
def container(
    lab: Lab,
    append_interval_ms: int = 5,
    size: int = IMAGE_BYTES,
    memory: int = 0,
    *,
    tree: bool = False,
) -> Iterator[None]:
    """The container, running on host a, and unknown on host b; at the end removed
    from both hosts.  memory: bytes that it holds and rewrites.  tree: its root is
    a directory, and `size` means nothing."""
    guest = build_guest(lab.folder)
    for host in (lab.a, lab.b):
        write_pyploop_config(host, tree)
    write_bundle(lab.a, append_interval_ms, memory)
    if tree:
        make_root(lab.a.outside(ROOTFS), guest)
    else:
        make_image(lab.a, guest, size)
    with contextlib.ExitStack() as stack:
        for host in (lab.a, lab.b):
            stack.callback(detach, host)
            stack.callback(remove, host)
        if not tree:
            attach(lab.a)
        start(lab.a)
        yield
