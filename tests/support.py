# SPDX-License-Identifier: Apache-2.0
"""What tests of several folders need; no fixtures here (tests/conftest.py)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
NOBODY = 65534

# ---- prerequisites

_PACKAGES = {
    "capsh": "libcap2-bin",
    "cc": "gcc",
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
    "mkfs.ext4": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "sshfs": "sshfs",
    "bindfs": "bindfs",
    "/usr/lib/openssh/sftp-server": "openssh-sftp-server",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "mksquashfs": "squashfs-tools",
    "mkfs.erofs": "erofs-utils",
    "mkfs.ntfs": "ntfs-3g",
    "ntfs-3g": "ntfs-3g",
    "btrfs": "btrfs-progs",
    "dmsetup": "dmsetup",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "fsfreeze": "util-linux",
    "ploop": "ploop",
    "gcc": "gcc",
    "readelf": "binutils",
    "objdump": "binutils",
    "addpart": "util-linux",
    "delpart": "util-linux",
    "chattr": "e2fsprogs",
    "ip": "iproute2",
    "ss": "iproute2",
    "nsenter": "util-linux",
    "ps": "procps",
    "rsync": "rsync",
    "podman": "podman",
    "nft": "nftables",
    "busybox": "busybox-static",
    "runc": "runc",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "numpy": "python3-numpy",
    "hypothesis": "python3-hypothesis",
    "rich": "python3-rich",
    "jsonschema": "python3-jsonschema",
}
"""Program or Python module -> the Debian package that has it."""


def missing(reason: str) -> NoReturn:
    """Skip the test; with CI=true that is a failure instead."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"missing on CI: {reason}", pytrace=False)
    pytest.skip(reason)


def needs(*things: str) -> None:
    """Skip visibly unless all are there: 'root', 'loop' (loop devices), a
    program, or a Python module written as 'module:NAME'."""
    for thing in things:
        if thing == "root":
            if os.geteuid() != 0:
                missing("needs root")
        elif thing == "loop":
            if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
                missing("needs root and loop devices (/dev/loop-control)")
        elif thing.startswith("module:"):
            name = thing.removeprefix("module:")
            if importlib.util.find_spec(name) is None:
                missing(f"needs the Python module {name} (Debian: {_PACKAGES.get(name, name)})")
        elif _which(thing) is None:
            missing(f"needs {thing} (Debian package {_PACKAGES.get(thing, thing)})")


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


_Cell = TypeVar("_Cell")


def telling(cells: Sequence[_Cell], *numbers: int) -> list[_Cell]:
    """Those cells of a matrix, counted from 0; all of them with PYPLOOP_MATRIX."""
    return list(cells) if os.environ.get("PYPLOOP_MATRIX") else [cells[n] for n in numbers]


# ---- commands


def run(
    *command: object,
    timeout: float = 60,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> str:
    """Run a command and return its stdout; a failure shows its stderr."""
    words = [str(w) for w in command]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=None if env is None else dict(env),
        pass_fds=pass_fds,
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(words)} exited with {done.returncode}: {done.stderr}")
    return done.stdout


def pyploop_cmd(deadlines: str = "") -> list[str]:
    """How the tests start `pyploop`: the installed one, by this interpreter.  deadlines: those
    that are shorter than they are (tests/lab/slowly.py), so that no test sits through them."""
    if not deadlines:
        return [sys.executable, "-m", "pyploop.cli.main"]
    slowly = str(ROOT / "tests" / "lab" / "slowly.py")
    words = ["env", f"PYPLOOP_DEADLINES={deadlines}", sys.executable, slowly]
    return [*words, "pyploop.cli.main"]


def pyploop_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment in which the tests start it."""
    return {**os.environ, **(extra or {})}


def as_nobody() -> list[str]:
    """Prefix of a command that runs without privileges.  Skips where nobody else
    can read the interpreter or the package, below a private home say."""
    needs("root", "setpriv")
    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    probe = [*prefix, sys.executable, "-c", "import pyploop.system.kernel"]
    done = subprocess.run(probe, env=pyploop_env(), capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"{sys.executable} or pyploop cannot be read without privileges")
    return prefix


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Poll until the condition holds; a failure names it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)


# ---- devices and mounts


@contextlib.contextmanager
def loop_device(
    image: Path | str, *, offset: int = 0, options: Sequence[str] = ()
) -> Iterator[str]:
    """/dev/loopN on an image file."""
    before = _loops(image)
    try:
        name = run("losetup", "--find", "--show", f"--offset={offset}", *options, image).strip()
    except BaseException:  # interrupted, it may have made one
        for made in _loops(image) - before:
            run("losetup", "--detach", made)
        raise
    try:
        yield name
    finally:
        run("losetup", "--detach", name)


def _loops(image: Path | str) -> set[str]:
    """The loop devices on an image file, as /dev/loopN."""
    return set(run("losetup", "-nO", "NAME", "--associated", image).split())


@contextlib.contextmanager
def partition(device: str, number: int, start: int, size: int) -> Iterator[str]:
    """A partition of the device, without a table: not every kernel reads one."""
    needs("addpart", "delpart")
    run("addpart", device, number, start // 512, size // 512)
    try:
        yield f"{device}p{number}"
    finally:
        # Busy for a while: the server of a FUSE file system closes it some time after
        # umount(8), and a new mount namespace of another test may have it mounted.
        words = ["delpart", device, str(number)]
        wait_until(
            lambda: subprocess.run(words, capture_output=True, check=False).returncode == 0,
            f"{device}p{number} is not in use",
        )


@contextlib.contextmanager
def mounted(
    source: str, point: Path, options: str = "rw", fstype: str | None = None
) -> Iterator[Path]:
    """`source` mounted on the folder `point`, which is made if need be."""
    needs("root")
    point.mkdir(parents=True, exist_ok=True)
    try:
        run("mount", *(["-t", fstype] if fstype else []), "-o", options, source, point)
        yield point
    finally:
        # A test that failed while frozen must not leave the machine so.
        subprocess.run(["fsfreeze", "-u", str(point)], stderr=subprocess.DEVNULL, check=False)
        unmount(point)


def unmount(point: Path) -> None:
    """All that is mounted there, once nobody looks into it any more."""
    deadline = time.monotonic() + 20
    while os.path.ismount(point):
        if time.monotonic() > deadline:
            run("umount", "--lazy", point)
            raise AssertionError(f"{point} stayed busy; unmounted lazily")
        if subprocess.run(["umount", str(point)], capture_output=True, check=False).returncode:
            time.sleep(0.1)


def tmpfs(point: Path, size: int) -> contextlib.AbstractContextManager[Path]:
    """A tmpfs of `size` bytes."""
    return mounted("tmpfs", point, f"size={size}", "tmpfs")


def is_frozen(point: Path | str) -> bool:
    """The mounted file system refuses to be frozen again.

    It is thawed again when it was not frozen, so a write never waits."""
    done = subprocess.run(
        ["fsfreeze", "-f", str(point)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        run("fsfreeze", "-u", point)
        return False
    assert "busy" in done.stderr, done.stderr
    return True


# ---- D1, independent of pyploop.wire

D1_MARK = 0x4CC0AC3D
D1_HEADER = struct.Struct("<IIQ")
SUCCESS, FAILURE = b"SUCCESS\n", b"FAILURE\n"


def d1_frame(pos: int, data: bytes) -> bytes:
    return D1_HEADER.pack(D1_MARK, len(data), pos) + data


def d1_header(size: int, pos: int, mark: int = D1_MARK) -> bytes:
    return D1_HEADER.pack(mark, size, pos)


def d1_sync(payload: bytes = b"\0\0\0\0") -> bytes:
    return d1_frame(0, payload)


def d1_end() -> bytes:
    return D1_HEADER.pack(D1_MARK, 0, 0)


@dataclass(frozen=True)
class Frame:
    pos: int
    data: bytes

    @property
    def is_end(self) -> bool:
        return len(self.data) == 0

    @property
    def is_sync(self) -> bool:
        return len(self.data) == 4


def d1_parse(stream: bytes) -> list[Frame]:
    """The frames of a stream that may end anywhere between two of them;
    AssertionError for a bad marker, a cut frame, or anything after END."""
    frames: list[Frame] = []
    at = 0
    while at < len(stream):
        assert not (frames and frames[-1].is_end), f"{len(stream) - at} bytes after END"
        assert len(stream) - at >= D1_HEADER.size, f"cut header at {at}"
        mark, size, pos = D1_HEADER.unpack_from(stream, at)
        assert mark == D1_MARK, f"marker {mark:#x} at {at}"
        at += D1_HEADER.size
        assert len(stream) - at >= size, f"cut data at {at}"
        frames.append(Frame(pos, stream[at : at + size]))
        at += size
    return frames


def d1_replay(frames: Sequence[Frame], image: bytes = b"") -> bytes:
    """The image that a receiver makes of the frames."""
    out = bytearray(image)
    for f in frames:
        if f.is_end or f.is_sync:
            continue
        out.extend(bytes(max(0, f.pos + len(f.data) - len(out))))
        out[f.pos : f.pos + len(f.data)] = f.data
    return bytes(out)
