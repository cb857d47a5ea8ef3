# SPDX-License-Identifier: Apache-2.0
"""Open and mapped files that CRIU (4.2) cannot dump."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyploop.runtimes.runc import members
from pyploop.system import mount_table

_DELETED = " (deleted)"
_NO_PATH = ("/memfd:", "/dev/zero (deleted)", "/SYSV", "/[aio]", "/anon_hugepage")
"""Names of files that lie on a mount of the kernel's own, and that CRIU knows."""
_SECRET = "/secretmem"
_ANONYMOUS = "anon_inode:"
_DUMPED = {"eventpoll", "eventfd", "signalfd", "timerfd", "inotify", "fanotify", "pidfd"}
"""Anonymous files that CRIU dumps."""
_NAMES = {"io_uring": "io-uring", "userfaultfd": "userfaultfd"}


@dataclass(frozen=True)
class Problem:
    """What makes a dump fail."""

    check: str
    """Its name in CHECKS."""
    what: str
    """With the process, and the descriptor or path."""
    path: str | None = None


@dataclass(frozen=True)
class Descriptor:
    """A descriptor of a process."""

    pid: int
    number: int
    link: str
    """What /proc says of its file."""
    stat: os.stat_result
    mount: int
    """The number of the mount on which it lies."""
    proc: str = "/proc"

    def is_packets(self) -> bool:
        if not self.link.startswith("pipe:"):
            return False
        with (
            contextlib.suppress(OSError),
            open(f"{self.proc}/{self.pid}/fdinfo/{self.number}") as f,
        ):
            return any(x.startswith("flags:") and int(x.split()[1], 8) & os.O_DIRECT for x in f)
        return False

    def __str__(self) -> str:
        return f"descriptor {self.number} of process {members.named([self.pid], self.proc)}"


def descriptors(pids: Sequence[int], proc: str = "/proc") -> list[Descriptor]:
    """Those of all these processes.  One that several have inherited counts once."""
    found: dict[tuple[object, ...], Descriptor] = {}
    for pid in pids:
        folder = f"{proc}/{pid}/fd"
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):  # closed meanwhile
                    link = os.readlink(f"{folder}/{name}")
                    st = os.stat(f"{folder}/{name}")
                    mount = _mount_in(f"{proc}/{pid}/fdinfo/{name}")
                    key = (name, link, st.st_dev, st.st_ino, mount)
                    found.setdefault(key, Descriptor(pid, int(name), link, st, mount, proc))
    return list(found.values())


def _mount_in(path: str) -> int:
    with open(path) as f:
        return next((int(x.split()[1]) for x in f if x.startswith("mnt_id:")), 0)


@dataclass(frozen=True)
class Mapping:
    """A mapped file that has no path any more, or never had one."""

    pid: int
    span: str
    """Addresses, as /proc has them."""
    link: str
    proc: str = "/proc"

    def stat(self) -> os.stat_result | None:
        try:
            return os.stat(f"{self.proc}/{self.pid}/map_files/{self.span}")
        except OSError:
            return None

    def __str__(self) -> str:
        return f"a mapping of process {members.named([self.pid], self.proc)}"


def mappings(pids: Sequence[int], proc: str = "/proc") -> Iterator[Mapping]:
    """Those of all these processes.  One that several have inherited counts once."""
    seen = set()
    for pid in pids:
        with contextlib.suppress(OSError), open(f"{proc}/{pid}/maps", errors="replace") as lines:
            for line in lines:
                if _DELETED in line or _ANONYMOUS in line or _SECRET in line:
                    words = line.rstrip("\n").split(None, 5)
                    if len(words) == 6:
                        first, _, last = words[0].partition("-")
                        span = f"{int(first, 16):x}-{int(last, 16):x}"
                        if (span, words[4]) not in seen:
                            seen.add((span, words[4]))
                            yield Mapping(pid, span, words[5], proc)


def special(
    files: Sequence[Descriptor], pids: Sequence[int], criu: str, proc: str = "/proc"
) -> Iterator[Problem]:
    """Files without a path, of which the kernel has many kinds."""
    every: list[Descriptor | Mapping] = [*files, *mappings(pids, proc)]
    for one in every:
        if one.link.startswith(_SECRET):
            yield Problem("memfd-secret", f"{one} is secret memory (memfd_secret)")
        if isinstance(one, Descriptor) and one.is_packets():
            yield Problem("packet-pipe", f"{one} is a pipe of packets (O_DIRECT)")
        if not one.link.startswith(_ANONYMOUS):
            continue
        kind = one.link.removeprefix(_ANONYMOUS).strip("[]").partition(":")[0]
        if kind in _DUMPED or (kind == "bpf-map" and _has_bpf(criu)):
            continue
        name = "bpf" if kind.startswith("bpf") else _NAMES.get(kind, "anonymous-file")
        yield Problem(name, f"{one} is of the kind {kind}")


def _has_bpf(criu: str) -> bool:
    """Whether CRIU was built with libbpf.  Then it dumps maps.  True when that is not known."""
    import shutil

    try:
        data = Path(shutil.which(criu) or criu).read_bytes()
    except OSError:
        return True
    return not data.startswith(b"\x7fELF") or b"libbpf.so" in data


def outside(
    files: Sequence[Descriptor], pids: Sequence[int], proc: str = "/proc"
) -> Iterator[Problem]:
    """Files that lie on no mount of the container, such as those with which it was started."""
    tables = _tables(pids, proc)
    inside = {e.number for table in tables.values() for e in table}
    queues = {e.dev for table in tables.values() for e in table if e.fstype == "mqueue"}
    for one in files:
        if not one.link.startswith("/") or one.mount in inside:
            continue
        if one.link.startswith((*_NO_PATH, _SECRET)):
            continue
        device = (os.major(one.stat.st_dev), os.minor(one.stat.st_dev))
        if device in queues:
            text = f"{one} is the POSIX message queue {one.link}"
            yield Problem("posix-queues", text, one.link)
        elif stat.S_ISCHR(one.stat.st_mode) and one.link.startswith("/dev/pts/"):
            text = f"{one} is the terminal {one.link} of this host"
            yield Problem("outside-terminal", text, one.link)
        else:
            text = f"{one} is {one.link}, which is mounted nowhere in the container"
            yield Problem("outside-file", text, one.link)


def _tables(pids: Sequence[int], proc: str) -> dict[str, list[mount_table.Entry]]:
    """The mount table of each mount namespace."""
    found: dict[str, list[mount_table.Entry]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            namespace = os.readlink(f"{proc}/{pid}/ns/mnt")
            if namespace not in found:
                found[namespace] = mount_table.read(Path(f"{proc}/{pid}/mountinfo"))
    return found


def deleted(
    files: Sequence[Descriptor],
    pids: Sequence[int],
    limit: int,
    proc: str = "/proc",
) -> Iterator[Problem]:
    """Deleted files that are in use.  CRIU keeps their contents, up to a limit.  One that has
    other names would need a new one, and CRIU takes that back when the container must be able
    to go on here (link-remap with --leave-running).  limit: bytes."""
    seen = set()
    every: list[Descriptor | Mapping] = [*files, *mappings(pids, proc)]
    for one in every:
        if not one.link.endswith(_DELETED) or one.link.startswith((*_NO_PATH, _SECRET)):
            continue
        st = one.stat if isinstance(one, Descriptor) else one.stat()
        if st is None or not stat.S_ISREG(st.st_mode) or (st.st_dev, st.st_ino) in seen:
            continue
        seen.add((st.st_dev, st.st_ino))
        path = one.link.removesuffix(_DELETED)
        if st.st_nlink > 0:
            text = f"{one} is {path}, which was deleted and has another name still"
            yield Problem("deleted-file-linked", text, path)
        if st.st_nlink == 0 and st.st_blocks * 512 > limit:
            text = f"{one} is {path}, which was deleted and takes {st.st_blocks * 512} bytes "
            yield Problem("deleted-file-size", f"{text}(ghost-limit is {limit})", path)
