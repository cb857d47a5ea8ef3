# SPDX-License-Identifier: Apache-2.0
"""Pods of Podman move as one: their containers are suspended together, and run on one host."""

from __future__ import annotations

import json
import os

import podmen
import pytest
from lab import container, podman, verify
from lab.hosts import Host, Lab
from podmen import POD, debris, judge, migrate, only_side
from support import wait_until

MIGRATIONS = int(os.environ.get("PYPLOOP_MIGRATIONS", "2"))
"""Back and forth."""
QUEUED = 100_000
"""Numbers in a connection: more than its peer has room for, less than its own end has."""
ISOLATED = ("--network", "none")
SERVER = "mkfifo /tmp/f; nc -l -p 7000 </tmp/f | while read n; do echo $n >>/data/got; done >/tmp/f"
TALKER = """
n=0
while :; do n=$((n + 1)); echo $n; echo $n >/dev/shm/n; sleep 0.01; done | nc 127.0.0.1 7000
"""
"""Each number goes to the other container by one connection over the loopback."""


pair, both = podmen.pair, podmen.both
no_descriptor_is_left = podmen.no_descriptor_is_left


def lines(host: Host) -> list[int]:
    """The numbers that the counting container has printed."""
    return [int(x.split()[1]) for x in host.run("podman", "logs", podman.PEER).splitlines()]


def inspect_pod(host: Host) -> dict[str, object]:
    found = json.loads(host.run("podman", "pod", "inspect", podman.POD))
    return dict(found)


def test_a_pod_of_two_goes_back_and_forth_and_podman_knows_it(pair: Lab) -> None:
    with podman.running_pod(pair, "--label", "kind=guest", "--restart=always"):
        here = pair.a
        names = (podman.NAME, podman.PEER)
        before = {name: podman.inspect(here, name=name) for name in names}
        of_pod = inspect_pod(here)
        with verify.client(pair) as client:
            for turn in range(MIGRATIONS):
                client.load(10 if turn % 2 else 0)
                client.mark()
                done = migrate(pair, here, what=POD)
                assert done.code == 0, done.errors
                here = pair.other(here)
                assert judge(pair, client, what=POD) is here
                for name in names:
                    now = podman.inspect(here, name=name)
                    for key in ("Id", "Name", "Image", "ImageName", "Config", "OCIRuntime"):
                        assert now[key] == before[name][key], (name, key)
                    known = before[name]["HostConfig"]
                    differ = {k for k, v in now["HostConfig"].items() if v != known[k]}
                    # They name the pod and its infra container, which have other IDs.
                    assert differ <= {"CgroupParent", "IpcMode", "NetworkMode", "UTSMode"}, name
                pod = inspect_pod(here)
                assert pod["State"] == "Running"
                assert {*pod["SharedNamespaces"]} == {*of_pod["SharedNamespaces"]}  # type: ignore[misc]
                for key in ("Name", "ExitPolicy", "Hostname", "CgroupParent", "NumContainers"):
                    assert pod[key] == of_pod[key], key
                numbers = lines(here)
                assert numbers == list(range(1, len(numbers) + 1)), "a line is lost, or twice there"


def test_what_the_containers_of_a_pod_share_moves_once_for_all(both: Lab) -> None:
    host = both.a
    named = ("--name", podman.POD, "--infra-name", podman.INFRA)
    host.run("podman", "pod", "create", *named, *ISOLATED)
    options = ("--pod", podman.POD, "--volume=data:/data")
    podman.start(host, *options, script=SERVER)
    podman.start(host, *options, name=podman.PEER, script=TALKER)

    def got() -> list[str]:
        return host.run("podman", "exec", podman.NAME, "cat", "/data/got").split()

    wait_until(lambda: host.run("podman", "exec", podman.NAME, "ls", "/data").strip(), "it runs")
    wait_until(lambda: len(got()) > 5, "they talk")
    done = migrate(both, host, what=POD)
    assert done.code == 0, done.errors
    assert only_side(both, POD) is both.b
    host = both.b
    known = len(got())
    wait_until(lambda: len(got()) > known, "they go on talking")
    numbers = got()
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)], "the connection lost a byte"
    for name in (podman.NAME, podman.PEER):
        assert host.run("podman", "exec", name, "cat", "/dev/shm/n").strip()
        assert host.run("podman", "exec", name, "cat", "/data/got").split()
    assert "has one of its own from then on" in done.errors + done.out
    assert not debris(both.a, runs_here=False)


def test_a_pod_that_is_not_live_is_stopped_and_started_on_the_other_host(both: Lab) -> None:
    podman.start_pod(both.a, "--restart=always", "--stop-timeout=1")
    word = ["pyploop", "migrate", "--config", "/srv/pyploop.toml", "b", POD.word]
    both.a.run(*word, timeout=90)
    assert only_side(both, POD) is both.b
    assert not debris(both.a, runs_here=False)


REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "shared processes": (("--share=net,pid",), ("share the namespaces pid",)),
    "limits and sysctls": (
        ("--cpus=1", "--sysctl=net.core.somaxconn=99"),
        ("cpu_quota", "net.core.somaxconn"),
    ),
    "host network": (("--network=host",), ("uses the network of this host",)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_pod_that_cannot_be_made_again_is_refused_before_anything_starts(
    both: Lab, what: str
) -> None:
    options, wanted = REFUSED[what]
    host = both.a
    host.run("podman", "pod", "create", "--name", podman.POD, *options)
    podman.start(host, "--pod", podman.POD, script=podman.COUNTING)
    done = migrate(both, host, what=POD)
    failed = [e for e in done.events if e["event"] == "check-failed"]
    of_pod = [e for e in failed if e["check"] == "podman-pod"]
    for words in wanted:
        assert any(words in e["message"] for e in of_pod), (words, done.errors)
    assert all(e["hint"] for e in of_pod)
    assert podman.states(host)[podman.NAME] == "running"
    assert not podman.states(both.b)


def test_one_container_of_a_pod_is_refused_and_the_command_for_the_pod_named(both: Lab) -> None:
    podman.start_pod(both.a, link=ISOLATED)
    done = migrate(both, both.a)
    assert done.code == 15
    assert f"belongs to the pod {podman.POD}" in done.errors
    assert f"pyploop migrate HOST podman:{podman.POD}" in done.errors
    # The pod as a whole is explained, and nothing stands in its way.
    words = ["pyploop", "migrate", "--live", "--explain", "--config", container.PYPLOOP_CONFIG]
    said = both.a.run(*words, "b", POD.word, timeout=90)
    assert said.startswith(f"Podman's pod {podman.POD} has on this host:\n  2 containers:")
    for name in (podman.NAME, podman.PEER):
        assert f"  {name}: changes of the image, " in said
    assert f"  {podman.NAME}: volume data, " in said
    assert "Nothing stands in the way" in said and "[trust]" in said


def test_a_full_connection_within_one_container_loses_no_byte(both: Lab) -> None:
    host, slowly = both.a, "while [ ! -e /data/all ]; do dd bs=64 count=1; sleep 0.01; done; cat"
    much, files = f"{{ seq 1 {QUEUED}; sleep 9999; }}", ("got", "back")
    into = [f"{{ {slowly}; }} 2>/dev/null >/data/{file} &" for file in files]
    # Two, one each way: whether the sender is restored first makes a difference.
    script = f"""
    sleep 9999 | nc -l -p 7000 | {into[0]}
    {much} | nc -l -p 7001 >/dev/null &
    for port in 1B58 1B59; do until grep -q ":$port " /proc/net/tcp*; do :; done; done
    {much} | nc 127.0.0.1 7000 >/dev/null &
    sleep 9999 | nc 127.0.0.1 7001 | {into[1]}
    wait
    """
    podman.start(host, *ISOLATED, "--volume=data:/data", script=script)

    def inside(words: str) -> list[str]:
        return host.run("podman", "exec", podman.NAME, "sh", "-c", words).split()

    queued = "netstat -tn | while read p r s x; do [ $s -gt 100000 ] && echo $s; done 2>/dev/null"
    wait_until(lambda: len(inside(f"{queued}; true")) == 2, "both have data to send")
    for _ in range(2):
        done = migrate(both, host)
        assert done.code == 0, done.errors
        host = both.other(host)
        pid = str(podman.inspect(host)["State"]["Pid"])
        inner = host.run("nsenter", f"--net=/proc/{pid}/ns/net", "nft", "list", "tables")
        assert "pyploop" not in inner, "its packets are still held"
    inside("touch /data/all")
    numbers = [str(n) for n in range(1, QUEUED + 1)]
    for file in files:
        wait_until(lambda f=file: len(inside(f"cat /data/{f}")) >= QUEUED, "all arrives")  # type: ignore[misc]
        assert inside(f"cat /data/{file}") == numbers, "a byte is lost, or twice there"
