# SPDX-License-Identifier: Apache-2.0
"""A runc container that goes on from what a failed restore has kept (--keep-dst)."""

from __future__ import annotations

import random

from lab import container, verify
from lab.hosts import CONTAINER_IP, CONTAINER_NETNS, Lab, run
from moving import Outcome, files, judge, migrate

MIB = 1 << 20
FILLER = 24 * MIB


def wire(done: Outcome) -> int:
    """Bytes of the disk's stream."""
    return int(next(e for e in done.events if e["event"] == "summary")["wire_bytes"])


def test_a_live_migration_goes_on_from_a_disk_that_was_mounted_and_kept(two_hosts: Lab) -> None:
    a, b = two_hosts.a, two_hosts.b
    before = files(b)
    address = ("nsenter", f"--net={CONTAINER_NETNS}", "ip", "addr")
    with container.container(two_hosts, size=192 * MIB), verify.client(two_hosts) as client:
        data = bytearray(random.Random(8).randbytes(FILLER))
        filler = a.outside(container.ROOTFS) / "data/filler"
        filler.write_bytes(data)
        client.load(2)
        client.mark()
        client.load(0)
        # Without its address the connection cannot be put back: the restore fails,
        # with the disk mounted there.
        b.run(*address, "del", f"{CONTAINER_IP}/24", "dev", "eth0")
        first = migrate(two_hosts, a, "--keep-dst")
        assert first.code == 7, first.errors
        b.run(*address, "add", f"{CONTAINER_IP}/24", "dev", "eth0")
        (image,) = [f for f in files(b) - before if f.endswith(".pyploop-kept")]
        assert judge(two_hosts, client, before | {image, RECORD}) is a
        # With a real container of its name there, it is refused, and stays.
        container.write_bundle(b)
        assert migrate(two_hosts, a).code == 9
        container.clear_bundle(b)
        assert {image, RECORD} <= files(b)
        for at, text in ((5 * MIB, bytes(MIB)), (9 * MIB + 11, b"x" * 289)):
            data[at : at + len(text)] = text
            with filler.open("r+b") as f:
                f.seek(at)
                f.write(text)
        done = migrate(two_hosts, a)
        assert done.code == 0, done.errors
        assert judge(two_hosts, client, before) is b
        (reused,) = [e for e in done.events if e["event"] == "reused"]
        assert reused["same"] > FILLER - 4 * MIB
        assert (b.outside(container.ROOTFS) / "data/filler").read_bytes() == data
        assert wire(done) < wire(first) / 2
        verify.check_append_log(b.outside(container.ROOTFS))
        container.remove(b)
        container.detach(b)
        run(["e2fsck", "-fn", str(b.outside(container.IMAGE))])


RECORD = f"/var/lib/pyploop/migrate/runc-{container.NAME}.kept"
