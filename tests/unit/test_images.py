# SPDX-License-Identifier: Apache-2.0
"""CRIU's images are looked into before they are restored: a process that may do more
than the container is not.  The images here are written by this file's own encoder."""

from __future__ import annotations

import contextlib
import copy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ocispec import plain
from test_policy import fit

from pyploop.errors import MigrateError
from pyploop.runtimes.oci import criu_images, image_files
from pyploop.wire import criu
from pyploop.wire.protobuf import Malformed, Message

Fields = dict[int, Any]
Images = dict[str, list[Fields]]
"""File -> its entries, each by field numbers."""
Change = Callable[[Images], object]

COMMON = 0x54564319
MAGIC = {
    "seccomp": 0x64413049,
    "inventory": 0x58313116,
    "pstree": 0x50273030,
    "core": 0x55053847,
    "ids": 0x54432030,
    "mountpoints": 0x55563928,
    "cgroup": 0x59383330,
    "userns": 0x55474906,
    "files": 0x56303138,
}
HOST = {5: 1, 6: 2, 7: 3, 8: 4, 9: 6, 10: 7, 11: 8}
OWN = {5: 9, 6: 10, 7: 11, 8: 12, 9: 13, 10: 7, 11: 8}
RO, RW = 1 | 1 << 21, 1 << 21
KILL, NET_BIND, AUDIT = 1 << 5, 1 << 10, 1 << 29


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def encode(fields: Fields) -> bytes:
    out = b""
    for number, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int):
                out += varint(number << 3) + varint(one)
                continue
            data = encode(one) if isinstance(one, dict) else one
            data = data.encode() if isinstance(data, str) else data
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def image(kind: str, entries: list[Fields]) -> bytes:
    head = b"" if kind == "inventory" else struct.pack("<I", COMMON)
    out = head + struct.pack("<I", MAGIC[kind])
    for entry in entries:
        data = encode(entry)
        out += struct.pack("<I", len(data)) + data
    return out


def mounted(*entry: Any) -> Fields:
    """Kind of file system, id, the parent's id, mount point, flags, root."""
    fstype, number, parent, point, flags, root = entry
    return {1: fstype, 2: number, 3: 40 + fstype, 4: parent, 5: flags, 6: root, 7: point, 8: "x"}


def task() -> Fields:
    caps = [KILL | NET_BIND | AUDIT, 0]
    creds = {**dict.fromkeys(range(1, 9), 0), 9: [0, 0], 10: caps, 11: caps, 12: caps, 13: 0}
    return {1: 1, 3: {1: 1}, 5: {1: 0, 2: 0, 3: 0, 4: 0, 10: {**creds, 18: 1, 19: [0, 0]}}}


def honest() -> Images:
    """As CRIU 4.2 dumps a container of `plain()` with two processes, one of which
    has two threads."""
    devices = "b *:* m\nc *:* m\nc 1:3 rwm\nc 5:2 rwm\nc 136:* rwm"
    points = [
        mounted(0, 236, 121, "/", RW, "/"),
        mounted(1, 237, 236, "/proc", RW, "/"),
        mounted(5, 238, 236, "/dev", RW, "/"),
        mounted(6, 239, 238, "/dev/pts", RW, "/"),
        mounted(2, 242, 236, "/sys", RO, "/"),
        mounted(5, 243, 242, "/sys/fs/cgroup", RO, "/"),
        {**mounted(12, 244, 243, "/sys/fs/cgroup/cpu", RO, "/ct"), 18: "/sys/fs/cgroup/cpu"},
        {**mounted(5, 157, 237, "/proc/kcore", RW, "/null"), 18: "/dev/null"},
        mounted(5, 81, 242, "/sys/firmware", RO, "/"),
    ]
    for n, name in enumerate(("bus", "fs", "irq", "sys", "sysrq-trigger")):
        points.append(mounted(1, 122 + n, 237, f"/proc/{name}", RO, f"/{name}"))
    return {
        "inventory.img": [{1: 2, 3: HOST, 5: 1}],
        "pstree.img": [{1: 1, 2: 0, 3: 1, 4: 1, 5: 1}, {1: 6, 2: 1, 3: 1, 4: 1, 5: [6, 7]}],
        **{f"core-{n}.img": [task()] for n in (1, 6, 7)},
        "ids-1.img": [{1: 1, **OWN}],
        "ids-6.img": [{1: 2, **OWN}],
        "mountpoints-13.img": points,
        "files.img": [{1: 1, 2: 1, 3: {1: 1, 2: 0, 3: 0, 6: "/guest", 7: 20}}, {1: 4, 2: 2}],
        "cgroup.img": [
            {
                1: [{1: 2, 2: [{1: "devices", 2: "/ct"}, {1: "cpu", 2: "/ct/sub"}]}],
                2: [
                    {1: "devices", 2: [{1: "ct", 3: [{1: "devices.list", 2: devices}]}]},
                    {1: "cpu", 2: [{1: "ct", 2: [{1: "sub"}], 3: [{1: "cpu.shares", 2: "9"}]}]},
                ],
            }
        ],
    }


def write(folder: Path, made: Images) -> None:
    for name, entries in made.items():
        kind = criu.kind_of(name)
        data = image(kind, entries) if kind in MAGIC else b""
        (folder / name).write_bytes(data)


def check(folder: Path, made: Images, config: Any = None) -> None:
    write(folder, made)
    criu_images.check(folder, fit(config or plain()))


def test_the_images_of_an_honest_container_are_restored(tmp_path: Path) -> None:
    check(tmp_path, honest())


def creds(change: Fields, name: str = "core-7.img") -> Change:
    return lambda made: made[name][0][5][10].update(change)


def point(path: str, **change: Any) -> Change:
    names = {"kind": 1, "parent": 4, "flags": 5, "root": 6, "at": 7, "key": 18, "ext": 13}

    def apply(made: Images) -> None:
        (entry,) = [e for e in made["mountpoints-13.img"] if e[7] == path]
        entry.update({names[key]: value for key, value in change.items()})

    return apply


def more(*entry: Any, **rest: Any) -> Change:
    names = {"key": 18, "dev": 3, "plugin": 12}
    extra = {names[k]: v for k, v in rest.items()}
    return lambda made: made["mountpoints-13.img"].append({**mounted(*entry), **extra})


def without(path: str) -> Change:
    def apply(made: Images) -> None:
        made["mountpoints-13.img"] = [e for e in made["mountpoints-13.img"] if e[7] != path]

    return apply


def cgroup(change: Callable[[Fields], object]) -> Change:
    return lambda made: change(made["cgroup.img"][0])


def prop(key: str, value: str) -> Change:
    return cgroup(lambda e: e[2][1][2][0][3].append({1: key, 2: value}))


def test_a_zombie_has_a_thread_by_chance_only(tmp_path: Path) -> None:
    """CRIU writes what happens to be in its memory, and restores none of it."""
    made = honest()
    made["pstree.img"].append({1: 8, 2: 1, 3: 1, 4: 1, 5: 72})
    made["core-8.img"] = [{1: 1, 3: {1: 2}}]
    check(tmp_path, made)
    made["core-8.img"] = [task()]  # it runs
    with pytest.raises(MigrateError, match=r"pstree\.img has the process 72, but"):
        check(tmp_path, made)
    del made["core-8.img"]
    (tmp_path / "core-8.img").unlink()
    with pytest.raises(MigrateError, match=r"pstree\.img has the process 8, but"):
        check(tmp_path, made)


ATTACKS: dict[str, tuple[Change, str]] = {
    "all capabilities": (creds({10: [0xFFFFFFFF, 0x1FF]}), "core-7.img has a process with CAP_CH"),
    "SYS_ADMIN": (creds({11: [1 << 21, 0]}), r"with CAP_SYS_ADMIN \(effective\)"),
    "bounding": (creds({12: [1 << 21, 0]}), r"CAP_SYS_ADMIN \(bounding\)"),
    "inheritable": (creds({9: [1 << 16, 0]}), r"CAP_SYS_MODULE \(inheritable\)"),
    "ambient": (creds({19: [1 << 19, 0]}), r"CAP_SYS_PTRACE \(ambient\)"),
    "BPF in the second word": (creds({10: [0, 1 << 7]}), "with CAP_BPF"),
    "packed": (creds({10: varint(1 << 21) + varint(0)}), "CAP_SYS_ADMIN"),
    "a number that no capability has": (creds({10: [0, 0, 1]}), r"\(permitted\) than there are"),
    "the same in many words": (creds({10: [0] * 9 + [1 << 31]}), "than there are"),
    "more words than can be": (creds({10: bytes(1 << 17)}), "more than 65536 numbers"),
    "the first process": (creds({10: [1 << 21, 0]}, "core-1.img"), "core-1.img has a process with"),
    "privileges to gain": (creds({18: 0}), "may gain privileges"),
    "an AppArmor profile": (creds({15: "other"}), "the label 'other'"),
    "no credentials": (lambda m: m["core-7.img"][0][5].pop(10), "without credentials"),
    "no thread": (lambda m: m["core-6.img"][0].pop(5), "without credentials"),
    "two credentials": (
        lambda m: m["core-7.img"][0][5].update({10: [m["core-7.img"][0][5][10]] * 2}),
        "comes twice",
    ),
    "two entries": (lambda m: m["core-7.img"].append(task()), "2 entries, not one"),
    "credentials of an old image": (lambda m: m.update({"creds-1.img": []}), "creds-1.img is of a"),
    "AppArmor's policy": (lambda m: m.update({"apparmor.img": []}), "never restored"),
    "binfmt": (lambda m: m.update({"binfmt-misc.img": []}), "never restored"),
    "old binfmt": (lambda m: m.update({"binfmt-misc-13.img": []}), "never restored"),
    "autofs": (lambda m: m.update({"autofs-4.img": []}), "never restored"),
    "real time": (lambda m: m["core-7.img"][0][5].update({4: 1}), "real-time priority"),
    **{
        f"the host's {kind}": (
            lambda m, n=number: m["ids-1.img"][0].update({n: HOST[n]}),  # type: ignore[misc]
            f"a process in the {kind} namespace of the host",
        )
        for kind, number in (("pid", 5), ("network", 6), ("ipc", 7), ("uts", 8), ("mount", 9))
    },
    "one process in the host's mounts": (
        lambda m: m["ids-6.img"][0].update({9: HOST[9]}),
        "ids-6.img has a process in the mount namespace of the host",
    ),
    "no namespaces": (lambda m: m.pop("ids-1.img"), "without namespaces of its own"),
    "none of the host": (lambda m: m["inventory.img"][0].pop(3), "the source's own namespaces"),
    "neither has a namespace": (
        lambda m: (m["ids-1.img"][0].pop(5), m["inventory.img"][0].update({3: {6: 2, 10: 7}})),
        "pid namespace of the host",
    ),
    "a user namespace": (
        lambda m: m["ids-1.img"][0].update({10: 99}),
        "user namespace, but config",
    ),
    "ids of users": (
        lambda m: m.update({"userns-7.img": [{1: [{1: 0, 2: 0, 3: 1}]}]}),
        "other uidMappings",
    ),
    "a signal when CRIU ends": (
        lambda m: m["core-1.img"][0][5].update({8: 9}),
        "a signal when its parent ends",
    ),
    "two first processes": (lambda m: m["pstree.img"][1].update({2: 0}), "2 first processes"),
    "no first process": (lambda m: m["pstree.img"][0].update({2: 5}), "0 first processes"),
    "a process without a core": (lambda m: m.pop("core-6.img"), "no core-6.img"),
    "a thread without a core": (lambda m: m.pop("core-7.img"), "no core-7.img"),
    "no mounts": (lambda m: m.pop("mountpoints-13.img"), "no mountpoints"),
    "no inventory": (lambda m: m.pop("inventory.img"), "no inventory.img"),
    "/proc/sys writable": (point("/proc/sys", flags=RW), "has /proc/sys writable"),
    "/proc/sys not mounted": (without("/proc/sys"), "does not protect /proc/sys"),
    "/sys/firmware": (without("/sys/firmware"), "does not protect /sys/firmware"),
    "/proc/sys below another": (point("/proc/sys", parent=236), "does not protect /proc/sys"),
    "/proc over it": (more(1, 300, 237, "/proc", RW, "/"), "two mounts on /proc"),
    "/proc over it, called otherwise": (more(1, 300, 237, "./proc", RW, "/"), "two mounts on /pr"),
    "/proc/../proc": (more(1, 300, 237, "/proc/../proc", RW, "/"), "mount on '/proc/../proc'"),
    "a second root": (more(0, 300, 236, "/", RW, "/"), "two mounts on /"),
    "another proc": (more(1, 300, 236, "/x", RW, "/"), "has / of /proc mounted on /x"),
    "a part of proc": (more(1, 300, 236, "/x", RW, "/sys"), "has /sys of /proc mounted on /x"),
    "/sys writable": (point("/sys", flags=RW), "has /sys writable"),
    "cgroups elsewhere": (more(12, 300, 236, "/x", RO, "/"), "has cgroups mounted on /x"),
    "cgroups writable": (point("/sys/fs/cgroup/cpu", flags=RW), "/sys/fs/cgroup/cpu writable"),
    "cgroup2 writable": (more(23, 300, 243, "/sys/fs/cgroup/u", RW, "/"), "cgroup/u writable"),
    "devtmpfs": (more(3, 300, 236, "/x", RW, "/"), "of the kind 3 on /x"),
    "binfmt_misc": (more(4, 300, 236, "/x", RW, "/"), "of the kind 4 on /x"),
    "debugfs": (more(11, 300, 236, "/x", RW, "/"), "of the kind 11 on /x"),
    "overlay": (more(17, 300, 236, "/x", RW, "/"), "of the kind 17 on /x"),
    "a disk of the host": (more(0, 300, 236, "/x", RW, "/", dev=999), "a file system on /x"),
    "external": (more(0, 300, 236, "/x", RW, "/", key="/"), "has / mounted on /x"),
    "external by itself": (more(0, 300, 236, "/x", RW, "/", key="/x"), "has /x mounted on /x"),
    "external by an old image": (point("/dev", ext=1), "that CRIU did not dump"),
    "by a plugin": (more(5, 300, 236, "/x", RW, "/", plugin=1), "that CRIU did not dump"),
    "null elsewhere": (point("/proc/kcore", at="/x"), "has /dev/null mounted on /x"),
    "a bind over /proc/sys": (point("/proc/sys", key="/data"), "has /data mounted on /proc/sys"),
    "a file of another host": (
        lambda m: m["files.img"][0][3].update({9: 1}),
        "open file from outside",
    ),
    "a file by a plugin": (lambda m: m["files.img"][1].update({1: 16}), "open file from outside"),
    "all devices": (
        cgroup(lambda e: e[2][0][2][0][3][0].update({2: "a *:* rwm"})),
        r"allows the device 'a \*:\* rwm'",
    ),
    "a disk": (
        cgroup(lambda e: e[2][0][2][0][3][0].update({2: "c 1:3 rwm\nb 8:0 r"})),
        "allows the device 'b 8:0 r'",
    ),
    "a rule that is none": (prop("devices.allow", "a"), "has the device rule 'a'"),
    "a release agent": (prop("release_agent", "/x"), "sets release_agent"),
    "notify": (prop("notify_on_release", "1"), "sets notify_on_release"),
    "a property elsewhere": (prop("../../x", "1"), "sets ../../x"),
    "another cgroup": (cgroup(lambda e: e[2][1][2].append({1: "ssh"})), "more than one cgroup"),
    "another's cgroup": (cgroup(lambda e: e[2][1][2][0].update({1: "ssh"})), "the cgroup '/ssh'"),
    "the root cgroup": (cgroup(lambda e: e[2][1][2][0].update({1: ""})), "the cgroup '/'"),
    "a cgroup in which nothing is": (
        cgroup(lambda e: e[2].append({1: "pids", 2: [{1: "ssh"}]})),
        "the cgroup '/ssh'",
    ),
    "a device elsewhere": (more(5, 300, 238, "/dev/x", RW, "/zero", key="/dev/zero"), "/dev/zero"),
    "a cgroup above": (cgroup(lambda e: e[2][1][2][0][2][0].update({1: ".."})), r"cgroup '\.\.'"),
}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_images_of_a_process_that_may_do_more_than_the_container_are_refused(
    tmp_path: Path, name: str
) -> None:
    change, named = ATTACKS[name]
    made = honest()
    change(made)
    with pytest.raises(MigrateError, match=named) as e:
        check(tmp_path, made)
    assert e.value.exit_code == 15


def test_a_process_needs_a_seccomp_filter_when_the_configuration_has_one(tmp_path: Path) -> None:
    config, made = plain(), honest()
    config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ERRNO"}
    with pytest.raises(MigrateError, match="without a seccomp filter"):
        check(tmp_path, made, config)
    for name in ("core-1.img", "core-6.img", "core-7.img"):
        made[name][0][5] |= {11: 2, 12: 0}
    check(tmp_path, made, config)
    made["core-7.img"] = [task()]  # a thread
    for flags, gets in ((0, False), (1, True)):  # SECCOMP_FILTER_FLAG_TSYNC
        made["seccomp.img"] = [{1: [{1: b"", 3: flags}]}]
        with contextlib.nullcontext() if gets else pytest.raises(MigrateError, match="core-7"):
            check(tmp_path, made, config)
    made["pstree.img"].append({1: 7, 2: 1, 3: 1, 4: 1, 5: 7})  # which is another process, too
    with pytest.raises(MigrateError, match="without a seccomp filter"):
        check(tmp_path, made, config)
    made["pstree.img"].pop()
    made["core-1.img"][0][3][11] = 0
    with pytest.raises(MigrateError, match="seccomp mode of an old image"):
        check(tmp_path, made, config)


def test_a_bind_of_the_configuration_is_mounted_where_and_how_it_says(tmp_path: Path) -> None:
    config, made = plain(), honest()
    config["mounts"].append(
        {"destination": "/data", "source": "/their/rootfs/d", "options": ["bind", "ro"]}
    )
    bind = {**mounted(0, 300, 236, "/data", RO, "/d"), 18: "/data", 3: 999}
    made["mountpoints-13.img"].append(bind)
    check(tmp_path, made, config)
    bind[5] = RW
    with pytest.raises(MigrateError, match="/data writable"):
        check(tmp_path, made, config)
    bind[5], bind[7] = RO, "/etc"
    with pytest.raises(MigrateError, match="has /data mounted on /etc"):
        check(tmp_path, made, config)


def test_a_user_namespace_has_the_ids_of_the_configuration(tmp_path: Path) -> None:
    config, made = plain(), honest()
    config["linux"]["namespaces"].append({"type": "user"})
    for key in ("uidMappings", "gidMappings"):
        config["linux"][key] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    with pytest.raises(MigrateError, match="in the user namespace of the host"):
        check(tmp_path, made, config)
    for name in ("ids-1.img", "ids-6.img"):
        made[name][0][10] = 20
    extent = {1: 0, 2: 100000, 3: 65536}
    made["userns-20.img"] = [{1: [extent], 2: [extent]}]
    check(tmp_path, made, config)
    made["userns-20.img"] = [{1: [extent], 2: [{**extent, 2: 0}]}]
    with pytest.raises(MigrateError, match="other gidMappings"):
        check(tmp_path, made, config)


def test_a_label_that_the_kernel_gives_is_restored_where_the_policy_has_it(
    tmp_path: Path,
) -> None:
    made = honest()
    for name in ("core-1.img", "core-6.img", "core-7.img"):
        made[name][0][5][10][15] = "system_u:system_r:container_t:s0"
    with pytest.raises(MigrateError, match="add it to apparmor or selinux"):
        check(tmp_path, made)
    criu_images.check(tmp_path, fit(plain()), ["system_u:system_r:container_t:s0"])


def test_controllers_that_are_mounted_together_are_found_by_each_name(tmp_path: Path) -> None:
    made = honest()
    entry = made["cgroup.img"][0]
    entry[1][0][2][1][1] = "cpu,cpuacct"
    entry[2][1][1] = ["cpu", "cpuacct"]
    check(tmp_path, made)


def test_devices_that_are_bound_in_a_user_namespace_are_restored(tmp_path: Path) -> None:
    made = honest()
    for name in ("null", "zero"):
        entry = mounted(5, 300, 238, f"/dev/{name}", RW, f"/{name}")
        made["mountpoints-13.img"].append({**entry, 18: f"/dev/{name}"})
    check(tmp_path, made)


def test_a_process_that_has_ended_needs_no_credentials(tmp_path: Path) -> None:
    made = honest()
    made["core-6.img"] = [{1: 1, 3: {1: 6, 2: 0}}]
    check(tmp_path, made)
    made["core-6.img"] = [{1: 1, 3: {1: 1, 2: 0}}]
    with pytest.raises(MigrateError, match="without credentials"):
        check(tmp_path, made)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ('["/dev/null", "pipe:[7]", "pipe:[8]"]', True),
        ('["/dev/null", "pipe:[7]", "pipe:[8]", "pipe:[9]"]', False),
        ('{"0": "pipe:[7]"}', False),
        ("[", False),
        ('["pipe:[7]"' + " " * 99 + "," * 99 + "]", False),
    ],
)
def test_no_descriptor_of_runcs_is_given_to_the_container_but_the_first_three(
    tmp_path: Path, text: str, taken: bool
) -> None:
    """The next ones lead to folders of the host."""
    (tmp_path / "descriptors.json").write_text(text)
    if taken:
        check(tmp_path, honest())
        return
    with pytest.raises(MigrateError, match=r"descriptors\.json must be a list") as e:
        check(tmp_path, honest())
    assert e.value.exit_code == 15


def test_an_image_that_is_no_file_is_refused(tmp_path: Path) -> None:
    made = honest()
    write(tmp_path, made)
    (tmp_path / "core-1.img").unlink()
    (tmp_path / "core-1.img").symlink_to("core-6.img")
    with pytest.raises(MigrateError, match="not a regular file"):
        criu_images.check(tmp_path, fit(plain()))


def test_a_huge_image_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, honest())
    with (tmp_path / "files.img").open("r+b") as f:
        f.truncate(1 << 40)
    with pytest.raises(MigrateError, match="more than any real one"):
        criu_images.check(tmp_path, fit(plain()))


@pytest.mark.parametrize("name", ["files.img", "pstree.img", "mountpoints-13.img"])
def test_entries_without_end_take_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Four bytes each, and 180 as an object: an image of 64 MiB took 2.9 GB, and minutes."""
    monkeypatch.setattr(image_files, "MOST_ENTRIES", 1000)
    monkeypatch.setattr(image_files, "MOST_LISTED", 500)
    write(tmp_path, honest())
    with (tmp_path / name).open("ab") as f:
        f.write(bytes(4 * 100_000))
    made = 0

    class Counted(Message):
        def __init__(self, data: bytes) -> None:
            nonlocal made
            made += 1
            super().__init__(data)

    monkeypatch.setattr(criu, "Message", Counted)
    with pytest.raises(MigrateError, match="entries") as e:
        criu_images.check(tmp_path, fit(plain()))
    assert e.value.exit_code == 15
    assert made < 1100


def test_many_large_images_are_not_all_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "ALL", 10_000)
    write(tmp_path, honest())
    (tmp_path / "files-1.img").write_bytes(image("files", [{2: b"x" * 5000}]))
    (tmp_path / "files-2.img").write_bytes(image("files", [{2: b"x" * 5000}]))
    with pytest.raises(MigrateError, match="more than 10000 bytes"):
        criu_images.check(tmp_path, fit(plain()))


def test_numbers_without_end_are_malformed() -> None:
    packed = encode({4: bytes(70_000)})
    with pytest.raises(Malformed, match="65536 numbers"):
        Message(packed).numbers32(4)


def test_no_bytes_of_an_image_surprise_the_check(tmp_path: Path) -> None:
    config, made = fit(plain()), honest()
    write(tmp_path, made)
    names = sorted(made)
    whole = {name: (tmp_path / name).read_bytes() for name in names}

    @settings(max_examples=200, deadline=None)
    @given(
        st.sampled_from(names),
        st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 9), st.binary(max_size=9))),
    )
    def damaged(name: str, edits: list[tuple[int, int, bytes]]) -> None:
        data = whole[name]
        for at, gone, new in edits:
            at = at % (len(data) + 1)  # noqa: PLW2901
            data = data[:at] + new + data[at + gone :]
        (tmp_path / name).write_bytes(data)
        try:
            criu_images.check(tmp_path, config)
        except MigrateError as e:
            assert e.exit_code == 15
        finally:
            (tmp_path / name).write_bytes(whole[name])

    damaged()


# ---- the reader of protocol buffers


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",
        b"\x08\xff",
        b"\x08" + b"\xff" * 10 + b"\x01",
        b"\x00\x01",
        b"\x0a\x05abc",
        b"\x0d\x00\x00",
        b"\x09\x00",
        b"\x0b\x0c",
        b"\x0e\x01",
        b"\x0a" + b"\xff" * 9 + b"\x01",
    ],
)
def test_bytes_that_are_no_message_are_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        Message(data)


def test_a_field_is_read_as_what_was_written() -> None:
    fields = {1: 5, 2: "text", 3: {4: (1 << 64) - 1}, 5: [1, 2, 1 << 35 | 7], 6: [{7: 8}, {7: 9}]}
    read = Message(encode(copy.deepcopy(fields)) + b"\x3d\x01\x00\x00\x00\x41" + bytes(8))
    assert (read.number(1), read.text(2)) == (5, "text")
    inner = read.message(3)
    assert inner is not None
    assert inner.number(4) == (1 << 64) - 1
    assert inner.number32(4) == (1 << 32) - 1
    assert read.numbers32(5) == [1, 2, 7]
    assert [m.number(7) for m in read.messages(6)] == [8, 9]
    assert (read.number(7), read.number(8), read.number(9)) == (1, 0, None)
    for wrong in (lambda: read.number(2), lambda: read.text(1), lambda: read.number(5)):
        with pytest.raises(Malformed):
            wrong()
    with pytest.raises(Malformed):
        Message(encode({1: "a\0b"})).text(1)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    try:
        Message(data)
    except Malformed:
        return
