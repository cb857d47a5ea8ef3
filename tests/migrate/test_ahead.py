# SPDX-License-Identifier: Apache-2.0
"""What a live migration of a runc container starts before the container is suspended."""

from __future__ import annotations

from gates import gates
from lab import container, verify
from lab.hosts import Lab
from moving import files, judge, migrate, migration

SIZE = 64 << 20


def test_runc_is_started_on_both_hosts_while_the_container_runs_and_only_once(
    two_hosts: Lab,
) -> None:
    before = files(two_hosts.b)
    with (
        container.container(two_hosts, size=SIZE),
        verify.client(two_hosts) as client,
        gates(two_hosts.a) as source,
        gates(two_hosts.b) as target,
    ):
        source.close_gate("checkpoint-before")
        target.close_gate("restore-before")
        with migration(two_hosts, two_hosts.a) as moving:
            source.wait("checkpoint-before")
            target.wait("restore-before")
            assert container.state(two_hosts.a) == "running"
            client.mark()  # it answers
            source.open_gate("checkpoint-before")
            target.open_gate("restore-before")
            done = moving.wait()
        assert done.code == 0, done.errors
        assert "started ahead" not in done.errors  # else the reason why not
        assert source.calls("checkpoint") == target.calls("restore") == 1
        # The version, and the work itself.
        assert source.calls("criu") == target.calls("criu") == 1
        assert judge(two_hosts, client, before) is two_hosts.b


def test_a_checkpoint_that_cannot_begin_fails_before_the_container_is_suspended(
    two_hosts: Lab,
) -> None:
    before = files(two_hosts.b)
    with (
        container.container(two_hosts, size=SIZE),
        verify.client(two_hosts) as client,
        gates(two_hosts.a) as source,
    ):
        source.fail("checkpoint", 3)
        done = migrate(two_hosts, two_hosts.a)
        assert done.code == 8, done.errors
        assert "which was not suspended yet" in done.errors
        assert "checkpoint was made to fail" in done.errors
        assert source.calls("checkpoint") == 1
        assert source.calls("link-down") == 0
        assert judge(two_hosts, client, before) is two_hosts.a


def test_a_restore_that_has_ended_before_its_time_is_started_again(two_hosts: Lab) -> None:
    before = files(two_hosts.b)
    with (
        container.container(two_hosts, size=SIZE),
        verify.client(two_hosts) as client,
        gates(two_hosts.b) as target,
    ):
        target.fail("restore", 3, number=1)
        done = migrate(two_hosts, two_hosts.a)
        assert done.code == 0, done.errors
        assert target.calls("restore") == 2
        assert judge(two_hosts, client, before) is two_hosts.b


def test_a_container_that_a_person_pauses_meanwhile_does_not_run_on_the_target(
    two_hosts: Lab,
) -> None:
    before = files(two_hosts.b)
    with (
        container.container(two_hosts, size=SIZE),
        verify.client(two_hosts) as client,
        gates(two_hosts.a) as source,
    ):
        source.close_gate("checkpoint-before")
        with migration(two_hosts, two_hosts.a) as moving:
            source.wait("checkpoint-before")
            two_hosts.a.run("runc", "pause", container.NAME)
            source.open_gate("checkpoint-before")
            done = moving.wait()
        assert done.code == 8, done.errors
        assert "was paused during the migration" in done.errors
        assert judge(two_hosts, client, before) is two_hosts.a
