# SPDX-License-Identifier: Apache-2.0
"""Mount options as in fstab, translated for mount(2), which knows fewer of them.

Options for mount(8) and other readers of fstab are dropped.  The list of these is from
libmount (util-linux, libmount/src/optmap.c).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pyploop.errors import ParameterError
from pyploop.system import kernel

_SET: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in kernel.MOUNT_FLAGS},
    "user": ("noexec", "nosuid", "nodev"),
    "users": ("noexec", "nosuid", "nodev"),
    "owner": ("nosuid", "nodev"),
    "group": ("nosuid", "nodev"),
}
"""Option without a value -> the flags that it sets."""
_CLEAR: dict[str, str] = {
    "rw": "ro",
    "suid": "nosuid",
    "dev": "nodev",
    "exec": "noexec",
    "async": "sync",
    "atime": "noatime",
    "diratime": "nodiratime",
    "norelatime": "relatime",
    "nostrictatime": "strictatime",
    "nolazytime": "lazytime",
    "symfollow": "nosymfollow",
    "loud": "silent",
    "noiversion": "iversion",
    "nomand": "mand",
}
_DROPPED = frozenset(
    [
        "defaults",
        "auto",
        "noauto",
        "nouser",
        "nousers",
        "noowner",
        "nogroup",
        "_netdev",
        "nofail",
        "loop",
        "sub",
        "nosub",
        "comment",
        "user",
        "group",
        "owner",
        "users",
    ]
)
"""With a value or without one."""
_DROPPED_PREFIXES = ("x-", "X-")
_REFUSED: dict[str, str] = {
    name: why
    for names, why in (
        ("remount move", "it is not an option of a new mount"),
        ("bind rbind", "a disk is mounted from its image, not from a folder"),
        ("offset sizelimit", "an image is attached as a whole"),
        ("uhelper helper", "no helper of mount(8) is called"),
        ("encryption", "loop devices do not encrypt"),
        (
            "device logdev rtdev journal_path journal_dev",
            "only the image moves, so all of the file system must lie in it",
        ),
        (
            "X-mount.subdir x-mount.subdir X-mount.idmap x-mount.idmap",
            "mount(2) has nothing like it",
        ),
        (
            "private rprivate shared rshared slave rslave unbindable runbindable",
            "the propagation of a mount is not set",
        ),
    )
    for name in names.split()
}


class MountWords(NamedTuple):
    """The flags and the data of mount(2)."""

    flags: int
    data: str


def split(options: str) -> list[str]:
    """Split at commas, but not inside double quotes: context="a,b" is one option."""
    return [word for word in re.findall(r'(?:[^,"]|"[^"]*"?)+', options) if word]


def parse(options: str) -> MountWords:
    """Later options win, as with mount(8).  ParameterError names an option that cannot be
    honoured."""
    flags: dict[str, bool] = {}
    data = []
    for option in split(options):
        name, equals, _ = option.partition("=")
        if why := _REFUSED.get(name):
            raise ParameterError(f"mount option {option}: {why}")
        if name.startswith("verity."):
            raise ParameterError(f"mount option {option}: dm-verity is not supported")
        if name == "loop" and equals:
            raise ParameterError(f"mount option {option}: the loop device cannot be chosen")
        if not equals and name in _SET:
            flags |= dict.fromkeys(_SET[name], True)
        elif not equals and name in _CLEAR:
            flags[_CLEAR[name]] = False
        elif name not in _DROPPED and not name.startswith(_DROPPED_PREFIXES):
            data.append(option)
    chosen = sum(kernel.MOUNT_FLAGS[name] for name, on in flags.items() if on)
    return MountWords(chosen, ",".join(data))


def value_of(options: str, name: str) -> str | None:
    """The last value of an option that has one; None: it is not there."""
    found = [w.partition("=")[2] for w in split(options) if w.startswith(f"{name}=")]
    return found[-1].strip('"') if found else None
