# SPDX-License-Identifier: Apache-2.0
"""`pyploop migrate` without --live: a runc container is stopped here, and
started there."""

from __future__ import annotations

import subprocess

from lab import container, verify
from lab.hosts import Lab, run
from moving import debris, files, only_side
from support import wait_until


def test_a_container_that_moves_stopped_loses_no_record(two_hosts: Lab) -> None:
    a, b = two_hosts.a, two_hosts.b
    before = files(b)
    with container.container(two_hosts):
        config = a.outside(container.PYPLOOP_CONFIG)
        # The guest, process 1 of its container, does not hear a SIGTERM.
        section = f"[container.{container.NAME}]\n"
        text = config.read_text().replace(section, f"{section}stop_timeout = 0.2\n")
        config.write_text(text)
        records = a.outside(container.ROOTFS) / "data/append.log"
        wait_until(lambda: records.stat().st_size > 10 * verify.RECORD, "it writes")
        words = ["pyploop", "migrate", "--config", container.PYPLOOP_CONFIG, b.name, container.NAME]
        done = subprocess.run(
            a.command(*words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert only_side(two_hosts) is b
        assert not debris(a, before, runs_here=False)
        assert not debris(b, before, runs_here=True)
        records = b.outside(container.ROOTFS) / "data/append.log"
        size = records.stat().st_size
        wait_until(lambda: records.stat().st_size > size, "it writes there")
        container.remove(b)
        # One run of the guest after the other, each without a gap.
        numbers = [int(line.split()[0]) for line in records.read_text().splitlines()]
        second = numbers.index(0, 1)
        assert numbers[:second] == list(range(second))
        assert numbers[second:] == list(range(len(numbers) - second))
        container.detach(b)
        run(["e2fsck", "-fn", str(b.outside(container.IMAGE))])
