# SPDX-License-Identifier: Apache-2.0
"""The parts of Podman's pods that need no Podman."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.podman import pod
from pyploop.runtimes.podman.pod_target import Together
from pyploop.system.jobs import Job

TOLD: dict[str, Any] = {
    "name": "web",
    "infra": "0123456789ab-infra",
    "shared": ["ipc", "net"],
    "hostname": "host",
    "labels": {"a": "b c"},
    "exit": "continue",
    "networks": {
        "lan": {
            "interface": "eth0",
            "mac": "02:00:0a:4d:00:64",
            "ips": ["10.77.0.100", "fd00::1"],
            "aliases": ["www"],
        }
    },
    "dns": ["10.0.0.1"],
    "dns_options": [],
    "dns_search": ["example.org"],
    "hosts": ["db:10.0.0.2"],
    "no_hosts": False,
}
PORT = {"host_ip": "::1", "host_port": 8000, "container_port": 80, "range": 2, "protocol": "tcp"}


def test_a_pod_is_made_with_the_options_that_it_has() -> None:
    assert pod.words(TOLD, [PORT]) == [
        "--name=web",
        "--infra-name=0123456789ab-infra",
        "--share=ipc,net",
        "--hostname=host",
        "--exit-policy=continue",
        "--label=a=b c",
        "--dns=10.0.0.1",
        "--dns-search=example.org",
        "--add-host=db:10.0.0.2",
        "--network=lan:mac=02:00:0a:4d:00:64,ip=10.77.0.100,ip6=fd00::1,interface_name=eth0,"
        "alias=www",
        "--publish=[::1]:8000-8001:80-81/tcp",
    ]


def test_a_pod_without_a_network_of_its_own_gets_none() -> None:
    assert "--network=none" in pod.words({**TOLD, "networks": {}}, [])
    words = pod.words({**TOLD, "shared": []}, [PORT])
    assert "--share=none" in words
    assert not [w for w in words if w.startswith(("--network", "--publish"))]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../web"),
        ("name", "-web"),
        ("infra", "a b"),
        ("shared", ["pid"]),
        ("hostname", "a\nb"),
        ("labels", {"a": 1}),
        ("labels", {"a\nb": "c"}),
        ("exit", "--rm"),
        ("networks", {"--privileged": TOLD["networks"]["lan"]}),
        ("networks", {"lan": {**TOLD["networks"]["lan"], "mac": "1,ip=2"}}),
        ("networks", {"lan": {**TOLD["networks"]["lan"], "ips": ["10.0.0.1,mac=x"]}}),
        ("networks", {"lan": {**TOLD["networks"]["lan"], "aliases": ["a,b"]}}),
        ("dns", [None]),
        ("hosts", [["a"]]),
    ],
)
def test_a_description_with_other_words_makes_no_pod(key: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        pod.words({**TOLD, key: value}, [])


@pytest.mark.parametrize(
    "port", [{"host_port": "x"}, {**PORT, "protocol": "tcp --rm"}, {**PORT, "host_ip": "a b"}]
)
def test_a_port_that_is_none_makes_no_pod(port: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        pod.words(TOLD, [port])


class Restores:
    """Of some containers.  Each asks at both steps, and then runs."""

    def __init__(self, number: int, folder: Path, commit: Callable[[], None]) -> None:
        self.ran: list[int] = []
        self._lock = threading.Lock()
        self.agreed = folder / "agreed"
        self.together = Together(number, commit, self.agreed)
        self._number = number

    def run(self, fails: dict[int, str]) -> None:
        """fails: number of a container -> the step before which its restore fails."""

        def restore(n: int) -> None:
            for step, ask in (("unlock", self.together.unlock), ("run", self.together.run)):
                if fails.get(n) == step:
                    raise MigrateError(VzExitCode.RESTORE_FAILED, f"no {step} of {n}")
                ask()
            with self._lock:
                self.ran.append(n)

        each = self.together.each
        jobs = [Job(each(lambda n=n: restore(n))) for n in range(self._number)]  # type: ignore[misc]
        for job in jobs:
            job.start()
        self.together.end(jobs)


def test_all_containers_of_a_pod_are_committed_once_and_run(tmp_path: Path) -> None:
    committed: list[str] = []
    restores = Restores(3, tmp_path, lambda: committed.append("once"))
    restores.run({})
    assert committed == ["once"] and sorted(restores.ran) == [0, 1, 2]
    assert restores.agreed.exists()


@pytest.mark.invariant(number=4)
@pytest.mark.parametrize("step", ["unlock", "run"])
def test_when_one_container_of_a_pod_fails_none_runs(tmp_path: Path, step: str) -> None:
    committed: list[str] = []
    restores = Restores(3, tmp_path, lambda: committed.append("once"))
    with pytest.raises(MigrateError, match=f"^no {step} of 1$"):
        restores.run({1: step})
    assert not restores.ran and not restores.agreed.exists()
    assert bool(committed) == (step == "run")


@pytest.mark.invariant(number=4)
def test_when_the_commit_of_a_pod_is_refused_none_runs(tmp_path: Path) -> None:
    def refuse() -> None:
        raise MigrateError(VzExitCode.RESTORE_FAILED, "the source has gone")

    restores = Restores(2, tmp_path, refuse)
    with pytest.raises(MigrateError, match="the source has gone"):
        restores.run({})
    assert not restores.ran and not restores.agreed.exists()
