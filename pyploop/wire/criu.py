# SPDX-License-Identifier: Apache-2.0
"""CRIU's image files: the parts that decide what a restored process may do.  No I/O.

An image is two magic numbers (one for the inventory), then entries: u32 length,
little endian, and a message of protocol buffers.  Field numbers are those of
CRIU 4.2 (criu/include/magic.h, images/*.proto in CRIU's sources).
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator
from enum import IntEnum

from pyploop.wire.protobuf import Malformed, Message, varint_of

COMMON = 0x54564319
MAGICS = {
    "inventory": 0x58313116,
    "pstree": 0x50273030,
    "core": 0x55053847,
    "ids": 0x54432030,
    "mountpoints": 0x55563928,
    "cgroup": 0x59383330,
    "userns": 0x55474906,
    "files": 0x56303138,
    "seccomp": 0x64413049,
    "pagemap": 0x56084025,
    "mm": 0x57492820,
}
_NAME = re.compile(r"([a-z0-9-]*?[a-z])(?:-[0-9]+|(?<=ghost-file)-[0-9a-f]+)?(?:\.tar\.gz)?\.img")


class Inventory(IntEnum):
    ROOT_IDS, ROOT_CG_SET = 3, 5


class Task(IntEnum):
    """pstree.proto"""

    PID, PPID, THREADS = 1, 2, 5


NAMESPACES = {"pid": 5, "network": 6, "ipc": 7, "uts": 8, "mount": 9, "user": 10, "cgroup": 11}
"""Kind -> field of task_kobj_ids_entry (core.proto)."""


class Core(IntEnum):
    TC, IDS, THREAD = 3, 4, 5


DEAD = (2, 6)
"""task_core_entry.task_state, its field 1, of a process that has ended."""


OLD_SECCOMP_MODE = 11
"""Its field that goes before the one of each thread."""


class Thread(IntEnum):
    """thread_core_entry of core.proto"""

    POLICY, PDEATH_SIG, CREDS, SECCOMP_MODE, SECCOMP_FILTER = 4, 8, 10, 11, 12


class Seccomp(IntEnum):
    """seccomp_entry and seccomp_filter of seccomp.proto"""

    FILTERS, FLAGS = 1, 3


class Creds(IntEnum):
    """creds.proto"""

    INHERITABLE, PERMITTED, EFFECTIVE, BOUNDING = 9, 10, 11, 12
    LSM_PROFILE, LSM_SOCKCREATE, NO_NEW_PRIVS, AMBIENT = 15, 16, 18, 19


class Pagemap(IntEnum):
    """pagemap_entry of pagemap.proto"""

    ADDRESS, OLD_PAGES, FLAGS, PAGES = 1, 2, 4, 5


LAZY_PAGES = 2
"""A bit of its flags: these pages can be loaded by page faults."""


MM_VMAS = 14
"""Field of mm.proto: the mappings."""


class Vma(IntEnum):
    """vma_entry of vma.proto"""

    START, END, FLAGS, STATUS = 1, 2, 6, 7


_PRIVATE, _ANONYMOUS, _NEVER = 0x02, 0x20, 0x2000 | 0x40000
"""MAP_PRIVATE, MAP_ANONYMOUS; MAP_LOCKED, MAP_HUGETLB."""
_REGULAR, _SPECIAL = 1, 1 << 2 | 1 << 3 | 1 << 12
"""VMA_AREA_REGULAR; VMA_AREA_VSYSCALL, VMA_AREA_VDSO, VMA_AREA_VVAR."""


def can_be_lazy(vma: Message) -> bool:
    """Whether the pages of a mapping can be loaded by page faults (vma_entry_can_be_lazy() in
    CRIU's sources)."""
    flags, status = vma.number32(Vma.FLAGS) or 0, vma.number32(Vma.STATUS) or 0
    private = flags & _PRIVATE and flags & _ANONYMOUS and not flags & _NEVER
    return bool(private and status & _REGULAR and not status & _SPECIAL)


def pagemap_entry(address: int, pages: int, flags: int) -> bytes:
    """An entry of an image of kind `pagemap`."""
    fields = {
        Pagemap.ADDRESS: address,
        Pagemap.OLD_PAGES: 0,
        Pagemap.FLAGS: flags,
        Pagemap.PAGES: pages,
    }
    data = b"".join(varint_of(key << 3) + varint_of(value) for key, value in fields.items())
    return struct.pack("<I", len(data)) + data


class Mount(IntEnum):
    """mnt.proto"""

    FSTYPE, ID, ROOT_DEV, PARENT, FLAGS, ROOT, POINT = 1, 2, 3, 4, 5, 6, 7
    PLUGIN, EXTERNAL, KEY = 12, 13, 18


class FsType(IntEnum):
    """mnt.proto"""

    OTHER, PROC, SYSFS, TMPFS, DEVPTS, CGROUP, MQUEUE, CGROUP2 = 0, 1, 2, 5, 6, 12, 14, 23


class File(IntEnum):
    """file_entry of fdinfo.proto; its type, and that of regfile.proto"""

    TYPE, REGULAR, INET, REGULAR_EXTERNAL, TYPE_EXTERNAL = 1, 3, 4, 9, 16


class InetSocket(IntEnum):
    """inet_sk_entry of sk-inet.proto"""

    PORT, PEER_PORT, SOURCE, PEER = 7, 8, 11, 12


CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID"),
    *("SETUID", "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST"),
    *("NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO"),
    *("SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
    *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE"),
    *("AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM"),
    *("BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"),
)
"""By their numbers, from 0 on (linux/capability.h)."""


def kind_of(name: str) -> str | None:
    """The kind of an image file, from its name; None when it is not one of CRIU's."""
    found = _NAME.fullmatch(name)
    return found[1] if found else None


def entries(kind: str, data: bytes) -> Iterator[Message]:
    """The entries, one at a time, since an image can have millions of empty ones.  Malformed
    when it is not an image of this kind."""
    magic = struct.pack("<I", MAGICS[kind])
    head = magic if kind == "inventory" else struct.pack("<I", COMMON) + magic
    if not data.startswith(head):
        raise Malformed(f"it does not begin like an image of kind {kind!r}")
    at = len(head)
    while at < len(data):
        if at + 4 > len(data):
            raise Malformed("it ends inside a length")
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            raise Malformed("it ends inside an entry")
        yield Message(data[at + 4 : end])
        at = end


def only(kind: str, data: bytes) -> Message:
    """The entry of an image that must have exactly one."""
    found = list(itertools.islice(entries(kind, data), 2))
    if len(found) != 1:
        least = "at least " if found else ""
        raise Malformed(f"it has {least}{len(found)} entries, not one")
    return found[0]
