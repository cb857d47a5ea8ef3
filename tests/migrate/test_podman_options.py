# SPDX-License-Identifier: Apache-2.0
"""What a user of Podman expects to go along with a container, and what does not."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from typing import Any

import moving
import podmen
import pytest
from gates import gates
from lab import container, hosts, podman
from lab.hosts import CONTAINER_IP, CONTAINER_MAC, Host, Lab
from podmen import WORD, debris, migrate, only_side
from support import wait_until

ISOLATED = ("--network", "none")
FOREVER = "while sleep 1; do :; done"


pair, no_descriptor_is_left = podmen.pair_with_image, podmen.no_descriptor_is_left


@pytest.fixture
def both(pair: Lab) -> Iterator[Lab]:
    """Two hosts without containers, the first with the image."""
    yield pair
    for host in (pair.a, pair.b):
        podman.remove(host)
    pair.b.run("podman", "rmi", "--all", "--force")


def sent_by(host: Host) -> int:
    """Bytes that it has sent to other hosts."""
    (link,) = json.loads(host.run("ip", "-s", "-j", "link", "show", "up0"))
    return int(link["stats64"]["tx"]["bytes"])


def commit(host: Host, below: str, name: str, script: str) -> None:
    """An image of one more layer."""
    words = ("podman", "run", "--name", "layer", *ISOLATED, *podman.ULIMITS, below)
    host.run(*words, "sh", "-c", script)
    host.run("podman", "commit", "--quiet", "layer", name)
    host.run("podman", "rm", "layer")


BASE = 24 << 20


def test_only_the_layers_of_an_image_that_the_target_lacks_go(both: Lab) -> None:
    a, b = both.a, both.b
    commit(a, podman.IMAGE, "base:1", f"dd if=/dev/urandom of=/big bs=1M count={BASE >> 20}")
    commit(a, "base:1", podman.IMAGE, "echo top >/top")
    a.run("podman", "tag", podman.IMAGE, "other:1", "taken:1")
    image = podman.inspect(a, "image", podman.IMAGE)
    # The target knows the lower layers from another image, and has another one of that name.
    a.run("podman", "save", "--quiet", "--output", a.folder / "base.tar", "base:1")
    try:
        b.run("podman", "load", "--quiet", "--input", a.folder / "base.tar")
        b.run("podman", "tag", "base:1", "taken:1")
        taken = podman.inspect(b, "image", "taken:1")["Id"]
        podman.start(a, *ISOLATED, "--stop-timeout=0", script=FOREVER)
        names = podman.inspect(b, "image", "taken:1")["RepoTags"]
        already = sent_by(a)
        # Not live: the wire is not probed then.
        a.run("pyploop", "migrate", "--config", container.PYPLOOP_CONFIG, "b", WORD)
        assert sent_by(a) - already < BASE / 50
        assert only_side(both) is b
        came = podman.inspect(b, "image", podman.IMAGE)
        for key in ("Id", "RootFS", "Config", "History"):
            assert came[key] == image[key], key
        assert podman.inspect(b)["ImageName"] == f"localhost/{podman.IMAGE}"
        assert sorted(came["RepoTags"]) == ["localhost/guest:1", "localhost/other:1"]
        assert podman.inspect(b, "image", "taken:1")["Id"] == taken
        assert podman.inspect(b, "image", "taken:1")["RepoTags"] == names
        assert b.run("podman", "exec", podman.NAME, "cat", "/top") == "top\n"
        assert not debris(a, runs_here=False)
    finally:
        os.unlink(a.folder / "base.tar")
        a.run("podman", "untag", "taken:1", "taken:1", check=False)


RICH = (
    *("--network=lan:ip=10.77.0.60,mac=02:00:0a:4d:00:60", "--publish=127.0.0.1:8080:80/tcp"),
    *("--hostname=guest", "--add-host=other:10.77.0.7", "--dns=10.77.0.1", "--dns-search=lan"),
    *("--label=kind=guest", "--annotation=note=kept", "--env=WORD=kept", "--workdir=/data"),
    *("--restart=on-failure:3", "--stop-timeout=7", "--stop-signal=SIGINT", "--umask=0027"),
    *("--health-cmd=/guest || exit 1", "--health-interval=disable", "--health-retries=2"),
    *("--secret=word,target=/etc/note", "--secret=word,type=env,target=SECRET", "--group-add=7"),
    *("--read-only", "--tmpfs=/tmp:size=1m,mode=1777", "--volume=data:/data", "--shm-size=2m"),
    *("--sysctl=kernel.shm_rmid_forced=1", "--cap-drop=ALL", "--cap-add=NET_BIND_SERVICE"),
    *("--pids-limit=50", "--memory=64m", "--cpu-shares=512", "--oom-score-adj=100"),
    *("--security-opt=no-new-privileges", "--log-driver=k8s-file", "--log-opt=max-size=1m"),
)
"""Options that `podman inspect` shows."""
OTHERS = {
    *("Created", "ImageDigest", "NetworkSettings.SandboxKey"),
    *("State.StartedAt", "State.Restored", "State.RestoredAt", "State.Pid", "State.ConmonPid"),
    *("State.Health.Status", "GraphDriver.Data.UpperDir", "GraphDriver.Data.MergedDir"),
    "GraphDriver.Data.WorkDir",
}
"""What differs after a migration (docs/internals/podman.md), and nothing else."""


def flat(value: object, path: str = "") -> dict[str, object]:
    """Each leaf of it by its path."""
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in flat(value[key], f"{path}.{key}").items()}
    if isinstance(value, list) and value:
        return {k: v for n, one in enumerate(value) for k, v in flat(one, f"{path}.{n}").items()}
    return {path.lstrip("."): value}


def test_podman_inspect_shows_the_same_container_as_before(both: Lab) -> None:
    for host in (both.a, both.b):
        host.run("sh", "-c", "echo secret | podman secret create word -")
    try:
        podman.start(both.a, *RICH, script=FOREVER)
        before = flat(podman.inspect(both.a))
        done = migrate(both, both.a)
        assert done.code == 0, done.errors
        now = flat(podman.inspect(both.b))
        differ = {k for k in before.keys() | now.keys() if before.get(k) != now.get(k)}
        assert differ == OTHERS
    finally:
        for host in (both.a, both.b):
            podman.remove(host)
            host.run("podman", "secret", "rm", "word")


UNITS = "/etc/systemd/system"


@pytest.fixture
def units(both: Lab) -> Iterator[Lab]:
    """Both hosts with a folder of units of their own."""
    for host in (both.a, both.b):
        host.run("sh", "-ec", f"mkdir -p {UNITS}; mount -t tmpfs tmpfs {UNITS}")
    yield both
    for host in (both.a, both.b):
        host.run("umount", UNITS)


def enabled(host: Host) -> dict[str, str]:
    """Unit -> whether it is enabled."""
    names = host.run("sh", "-c", f"cd {UNITS} && ls -d -- *.service 2>/dev/null", check=False)
    said = {n: host.run("systemctl", "is-enabled", n, check=False) for n in names.split()}
    return {name: word.strip() for name, word in said.items()}


def test_a_unit_of_systemd_goes_along_and_is_enabled_only_where_the_container_runs(
    units: Lab,
) -> None:
    a, b = units.a, units.b
    podman.start(a, *ISOLATED, script=FOREVER)
    a.run("sh", "-ec", f"podman generate systemd --name ct >{UNITS}/ct.service")
    other = f"sed s/^Type=.*/LimitNOFILE=9/ {UNITS}/ct.service >{UNITS}/own.service"
    a.run("sh", "-ec", f"{other}; systemctl enable ct.service own.service")
    text = a.outside(f"{UNITS}/ct.service").read_text()
    # A migration that is refused or fails changes nothing about them.
    b.outside(f"{UNITS}/ct.service").touch()
    refused = migrate(units, a)
    assert refused.code == 9
    assert "podman-systemd" in refused.errors
    b.outside(f"{UNITS}/ct.service").unlink()
    assert enabled(a) == {"ct.service": "enabled", "own.service": "enabled"}
    done = migrate(units, a)
    assert done.code == 0, done.errors
    assert only_side(units) is b
    assert "Does not move: the systemd unit own.service" in done.out + done.errors
    assert "'LimitNOFILE=9'" in done.out + done.errors
    assert enabled(a) == {"own.service": "disabled"}
    assert enabled(b) == {"ct.service": "enabled"}
    assert b.outside(f"{UNITS}/ct.service").read_text() == text
    back = migrate(units, b, "-r", "no")
    assert back.code == 0, back.errors
    assert enabled(a) == {"own.service": "disabled", "ct.service": "enabled"}
    assert enabled(b) == {"ct.service": "disabled"}


ECHO = f"busybox nc -l -p 80 -e cat & {FOREVER}"


@contextlib.contextmanager
def connected(lab: Lab) -> Iterator[None]:
    """A connection to the container's port 80, by its address."""
    words = lab.on_client("busybox", "nc", hosts.CONTAINER_IP, "80")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None and client.stdout is not None
        try:
            client.stdin.write(b"hello\n")
            client.stdin.flush()
            assert client.stdout.readline() == b"hello\n"
            yield
        finally:
            client.kill()


def test_a_container_gets_another_network_address_and_port_on_the_target(both: Lab) -> None:
    a, b = both.a, both.b
    podman.start(a, *podman.LINK, "--publish=8080:80", script=ECHO)
    b.run("podman", "network", "create", "--disable-dns", "--subnet=10.79.0.0/24", "other")
    try:
        options = ("--network", "other:ip=10.79.0.9", "--publish", "127.0.0.1:8090:81/udp")
        refused = migrate(both, a, "--check-only", "--network", "none:ip=10.79.0.9")
        assert "Podman has no network none on this host" in refused.errors
        with connected(both):
            done = migrate(both, a, *options)
        assert done.code == 0, done.errors
        assert "loses 10.77.0.100 (--network): its TCP connections end" in done.out
        assert only_side(both) is b
        networks = podman.inspect(b)["NetworkSettings"]
        assert list(networks["Networks"]) == ["other"]
        assert networks["Networks"]["other"]["IPAddress"] == "10.79.0.9"
        assert networks["Ports"] == {"81/udp": [{"HostIp": "127.0.0.1", "HostPort": "8090"}]}
        inside = b.run("podman", "exec", podman.NAME, "busybox", "ip", "-4", "addr")
        assert "10.79.0.9/24" in inside and "10.77.0.100" not in inside
        b.run("podman", "restart", "--time=0", podman.NAME)
        again = podman.inspect(b)["NetworkSettings"]["Networks"]["other"]
        assert again["IPAddress"] == "10.79.0.9"
    finally:
        podman.remove(b)
        b.run("podman", "network", "rm", "--force", "other")


def test_a_container_that_removes_itself_moves_and_does_so_on_the_target(both: Lab) -> None:
    a, b = both.a, both.b
    podman.start(a, *ISOLATED, "--rm", "--volume=data:/data", script=FOREVER)
    refused = migrate(both, a, "--check-only", "-r", "no")
    assert refused.code == 15
    assert "(--rm), and could not stay" in refused.errors
    assert [e["check"] for e in refused.events if e["event"] == "check-failed"] == ["podman-rm"]
    # A restore that fails leaves nothing there, and here it runs on.
    with gates(b, {"podman": {"* container restore *": "restore"}}) as restore:
        restore.fail("restore", 3, "before", 1)
        failed = migrate(both, a)
        assert failed.code == 7, failed.errors
        assert only_side(both) is a
        assert not debris(b, runs_here=False)
    # A setting of its network that cannot be made after the commit is reported.
    with gates(b, {"nsenter": {"* /proc/sys/net/ipv4/ping_group_range *": "set"}}) as setting:
        setting.fail("set", 3)
        done = migrate(both, a)
    assert done.code == 8, done.errors
    assert "setting sysctls of the container's network: " in done.errors
    assert only_side(both) is b
    assert not debris(a, runs_here=False)
    assert podman.volumes(b) == [podman.VOLUME]
    b.run("podman", "stop", "--time=0", podman.NAME)
    wait_until(lambda: not podman.states(b), "podman has removed it")
    assert podman.volumes(b) == [podman.VOLUME]


def explained(lab: Lab, word: str) -> tuple[str, dict[str, Any]]:
    """What --explain says, and the lines for migrate.toml in it."""
    words = ["pyploop", "migrate", "--live", "--explain", "--config", container.PYPLOOP_CONFIG]
    done = subprocess.run(
        lab.a.command(*words, lab.b.address, word),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=moving.SECONDS,
        check=False,
    )
    said = done.stdout
    text = said[said.index("[trust]") :]
    keys = "\n".join(x for x in text.splitlines() if x.startswith("[") or " = [" in x)
    return f"{done.returncode}\n{said}{done.stderr}", tomllib.loads(keys)


def test_explain_says_what_it_has_what_becomes_of_it_and_what_migrate_toml_needs(
    both: Lab,
) -> None:
    a, b = both.a, both.b
    before = b.outside(container.PYPLOOP_CONFIG).read_text()
    folder = a.outside("/srv/moves/data")
    folder.mkdir(parents=True)
    for host in (a, b):
        host.outside("/srv/stays").write_text("")
        host.run("sh", "-c", "echo secret | podman secret create word -")
    binds = ("--volume=/srv/moves/data:/data", "--volume=/srv/stays:/stays")
    options = (*binds, "--volume=data:/more", "--secret=word", "--publish=2222:22")
    podman.start(a, *podman.LINK, *options, "--cap-add=SYS_NICE", script=FOREVER)
    try:
        said, toml = explained(both, WORD)
        assert said.startswith("15\nPodman's container ct has on this host:"), said
        for words in (
            "  image localhost/guest:1 (",
            "  volume data, /var/lib/containers/storage/volumes/data/_data: copied while",
            "  bind /srv/moves/data: nothing says what becomes of it",
            f"  network lan ({CONTAINER_IP}, {CONTAINER_MAC}): the same addresses",
            "  published port 2222 to 22/tcp: published by the target",
            "  secret word: not copied; the target must have it",
            "/storage/overlay-containers/",
            "dumped by CRIU while suspended",
        ):
            assert words in said, (words, said)
        assert toml["trust"] == {"live": [a.address]}
        assert toml["podman"] == {"binds": ["/srv/moves"], "external": ["/srv/stays"]}
        assert "CAP_SYS_NICE" in toml["policy"]["capabilities"]
        assert toml["policy"].keys() == {"capabilities"}
        # With the lines that were printed, nothing stands in the way.
        lines = [
            f"[{section}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in keys.items())
            for section, keys in toml.items()
            if section != "trust"
        ]
        for host in (a, b):
            with host.outside(container.PYPLOOP_CONFIG).open("a") as f:
                f.write("\n".join(lines) + "\n")
        said, toml = explained(both, WORD)
        assert said.startswith("0\n") and "Nothing stands in the way" in said, said
        assert "bind /srv/moves/data: copied while it runs" in said
        assert "bind /srv/stays: not copied; the target must have it" in said
        assert toml == {"trust": {"live": [a.address]}}
        assert podman.states(a) == {podman.NAME: "running"} and not podman.states(b)
    finally:
        podman.remove(a)
        for host in (a, b):
            host.run("podman", "secret", "rm", "word")
            host.run("rm", "-rf", "/srv/moves", "/srv/stays")
            host.outside(container.PYPLOOP_CONFIG).write_text(before)
