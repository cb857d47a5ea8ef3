# SPDX-License-Identifier: Apache-2.0
"""Namespaces of single processes.  CRIU (4.2) can dump those of mounts, and no others."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence

from pyploop.runtimes.runc import members
from pyploop.runtimes.runc.preflight_files import Problem

_NS_GET_USERNS = 0xB701  # linux/nsfs.h
_NESTED = {
    "nested-pid-namespace": ("pid",),
    "nested-time-namespace": ("time", "time_for_children"),
    "nested-user-namespace": ("user",),
    "nested-uts-namespace": ("uts",),
    "nested-ipc-namespace": ("ipc",),
    "nested-network-namespace": ("net",),
    "nested-cgroup-namespace": ("cgroup",),
}
"""Check -> names in /proc/PID/ns."""


def of(pids: Sequence[int], proc: str = "/proc") -> Iterator[Problem]:
    """pids: the container's first process first."""
    for check, names in _NESTED.items():
        usual = _link(pids[0], names[0], proc)
        other = [
            pid
            for pid in pids
            if usual and any(_link(pid, name, proc) not in ("", usual) for name in names)
        ]
        if other:
            who = members.named(other, proc)
            kind = names[0]
            yield Problem(check, f"{who}: in, or for, a {kind} namespace of its own")
    users, owner = _inode(f"{proc}/{pids[0]}/ns/user"), _owner(f"{proc}/{pids[0]}/ns/net")
    host = _inode("/proc/self/ns/user")
    if owner and users not in (host, owner):
        text = "the container has a user namespace, and a network namespace of another one"
        yield Problem("user-namespace-network", text)


def _link(pid: int, name: str, proc: str) -> str:
    """Empty: the process has ended, or the kernel has none."""
    try:
        return os.readlink(f"{proc}/{pid}/ns/{name}")
    except OSError:
        return ""


def _inode(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.stat(path).st_ino
    return 0


def _owner(path: str) -> int:
    """The inode of the user namespace to which a namespace belongs; 0: not known."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            owner = fcntl.ioctl(fd, _NS_GET_USERNS)
        finally:
            os.close(fd)
        try:
            return os.fstat(owner).st_ino
        finally:
            os.close(owner)
    except OSError:
        return 0
