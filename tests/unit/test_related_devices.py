# SPDX-License-Identifier: Apache-2.0
"""Which devices share bytes with a source, in piles that this machine need not have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyploop.errors import SysfsError
from pyploop.system import mount_table, sysblock
from pyploop.system.mount_table import Entry
from pyploop.system.sysblock import BlockDevice, Loop
from pyploop.usage import related_devices, users

MIB = 1 << 20
FILE = ((8, 1), 42)


class Pile:
    """Devices by name, and how they lie on each other."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.devices: dict[str, BlockDevice] = {}
        self.loops: list[Loop] = []
        self.related: dict[tuple[str, str], list[str]] = {}
        patch.setattr(sysblock, "find", self.find)
        patch.setattr(sysblock, "loops", lambda: self.loops)
        patch.setattr(mount_table, "read", list)
        patch.setattr(sysblock, "partitions", self.partitions)
        patch.setattr(sysblock, "related", self.relatives)

    def find(self, dev: tuple[int, int]) -> BlockDevice:
        for device in self.devices.values():
            if device.dev == dev:
                return device
        raise SysfsError(f"no device {dev}")

    def partitions(self, disk: BlockDevice) -> Iterator[BlockDevice]:
        return (d for d in self.devices.values() if d.is_partition and d.disk == disk.name)

    def relatives(self, device: BlockDevice, kind: str) -> Iterator[BlockDevice]:
        return (self.devices[n] for n in self.related.get((device.name, kind), []))

    def disk(self, name: str, size: int) -> None:
        dev = (8, len(self.devices))
        self.devices[name] = BlockDevice(name, dev, name, dev, 0, size * MIB)

    def part(self, disk: str, name: str, start: int, size: int) -> None:
        dev = (259, len(self.devices))
        on = self.devices[disk]
        self.devices[name] = BlockDevice(name, dev, disk, on.dev, start * MIB, size * MIB)

    def maps(self, name: str, size: int, *slaves: str) -> None:
        self.disk(name, size)
        self.related[name, "slaves"] = list(slaves)
        for slave in slaves:
            self.related.setdefault((slave, "holders"), []).append(name)

    def loop(self, name: str, size: int, below: str | None = None, offset: int = 0) -> None:
        self.disk(name, size)
        on = None if below is None else self.devices[below].dev
        self.loops.append(Loop(self.devices[name], FILE, on, offset * MIB, "/file"))

    def of(self, name: str) -> tuple[list[str], list[str]]:
        """(tracked, untracked) members, in alphabetical order."""
        found = related_devices.find_related(self.devices[name])
        return (
            sorted(d.name for d in found.tracked),
            sorted(d.name for d in found.untracked),
        )


@pytest.fixture
def pile(monkeypatch: pytest.MonkeyPatch) -> Pile:
    return Pile(monkeypatch)


def lvm(pile: Pile) -> None:
    """A disk with a boot partition, and two logical volumes in the other."""
    pile.disk("sda", 100)
    pile.part("sda", "sda1", 1, 9)
    pile.part("sda", "sda2", 10, 90)
    pile.maps("dm-0", 40, "sda2")
    pile.maps("dm-1", 40, "sda2")


def test_a_whole_disk_has_all_that_is_stacked_on_it(pile: Pile) -> None:
    lvm(pile)
    assert pile.of("sda") == (["dm-0", "dm-1", "sda", "sda1", "sda2"], [])


def test_a_logical_volume_does_not_have_its_neighbours(pile: Pile) -> None:
    """Else each machine with LVM would be refused."""
    lvm(pile)
    assert pile.of("dm-0") == (["dm-0"], ["sda", "sda2"])
    pile.part("dm-0", "dm-0p1", 1, 20)
    assert pile.of("dm-0p1") == (["dm-0", "dm-0p1"], ["sda", "sda2"])


def test_a_mirror_has_both_halves(pile: Pile) -> None:
    for disk in ("sda", "sdb"):
        pile.disk(disk, 100)
        pile.part(disk, f"{disk}1", 1, 99)
    pile.maps("md0", 99, "sda1", "sdb1")
    assert pile.of("md0") == (["md0"], ["sda", "sda1", "sdb", "sdb1"])
    assert pile.of("sda1") == (["md0", "sda", "sda1"], [])


def test_an_extended_partition_does_not_have_the_logical_ones(pile: Pile) -> None:
    pile.disk("sda", 100)
    pile.part("sda", "sda4", 10, 0)  # the kernel shows two sectors of it
    pile.part("sda", "sda5", 11, 20)
    assert pile.of("sda5") == (["sda", "sda5"], [])


def test_only_devices_whose_ranges_of_a_file_overlap_are_related(pile: Pile) -> None:
    pile.loop("loop0", 100)
    pile.part("loop0", "loop0p1", 1, 19)
    pile.part("loop0", "loop0p2", 20, 30)
    pile.loop("loop1", 30, offset=20)
    pile.loop("loop2", 50, offset=50)
    assert pile.of("loop1") == (["loop1"], ["loop0", "loop0p2"])
    assert pile.of("loop0p1") == (["loop0", "loop0p1"], [])
    assert pile.of("loop2") == (["loop2"], ["loop0"])
    assert pile.of("loop0") == (["loop0", "loop0p1", "loop0p2"], ["loop1", "loop2"])


def test_the_queue_is_the_lowest_device_that_all_writes_pass(pile: Pile) -> None:
    pile.disk("sda", 100)
    pile.part("sda", "sda1", 10, 90)
    pile.loop("loop0", 80, below="sda1", offset=5)
    pile.part("loop0", "loop0p1", 1, 70)
    pile.loop("loop1", 60, below="loop0p1", offset=2)
    found = related_devices.find_related(pile.devices["loop1"])
    assert (found.queue.disk, found.queue.name) == ("sda", "sda1")
    assert found.queue.start == (10 + 5 + 1 + 2) * MIB and found.queue.size == 60 * MIB
    assert found.base == 8 * MIB and found.loop is None
    assert pile.of("loop1") == (["loop0", "loop0p1", "loop1", "sda", "sda1"], [])
    heights = {m.device.name: m.height for m in found.members}
    assert heights["loop1"] > heights["loop0p1"] == heights["loop0"] > heights["sda"]


def test_an_xfs_is_on_its_log_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysblock, "device_number", {"/dev/log": (8, 9)}.get)
    options = "rw,attr2,logdev=/dev/log,noquota"
    xfs = Entry(30, (8, 1), "/", "/m", "xfs", "/dev/sda1", options)
    ext4 = Entry(30, (8, 1), "/", "/m", "ext4", "/dev/sda1", options)
    assert xfs.devices() == {(8, 1), (8, 9)}
    assert ext4.devices() == {(8, 1)}


def test_swap_space_is_listed_by_names_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"Filename\tType\tSize\n/dev/sda3   partition\t1\t0\t-2\n/a\\040b\xff\tfile\t1\t0\t-3\n"
    monkeypatch.setattr(Path, "read_bytes", lambda self: text)
    assert users.swaps() == ["/dev/sda3", "/a b\udcff"]
