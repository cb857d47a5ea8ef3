# SPDX-License-Identifier: Apache-2.0
"""Containers of Podman move, with their image, their root and their volumes, and Podman knows
them afterwards as if they had always been there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import moving
import podmen
import pytest
import table
from lab import container, podman, verify
from lab.hosts import CONTAINER_IP, Host, Lab
from podmen import WORD, debris, judge, migrate, only_side
from support import wait_until

MIGRATIONS = int(os.environ.get("PYPLOOP_MIGRATIONS", "2" if table.ALL else "1"))
"""There, and with more back and forth."""
ISOLATED = ("--network", "none")
COUNTING = """
echo $$ >/data/pid
rm /etc/note
echo changed >/etc/changed
echo shared >/dev/shm/left
exec 3>/dev/shm/open
n=0
while sleep 0.02; do n=$((n + 1)); echo line $n; echo $n >&3; done
"""
"""Changes each place that a container can change, and counts."""
FOREVER = "while sleep 1; do :; done"


pair, both = podmen.pair, podmen.both
no_descriptor_is_left = podmen.no_descriptor_is_left


def test_a_container_of_podman_moves_under_load_and_podman_knows_it(pair: Lab) -> None:
    setting = "net.ipv4.ip_unprivileged_port_start"
    options = ("--label", "kind=guest", "--restart=always", f"--sysctl={setting}=77")
    with podman.running(pair, *options):
        before = podman.inspect(pair.a)
        (image,) = podman.images(pair.a)
        here = pair.a
        with verify.client(pair) as client:
            for turn in range(MIGRATIONS):
                client.load(0 if turn % 2 else 10)
                client.mark()
                done = migrate(pair, here)
                assert done.code == 0, done.errors
                here = pair.other(here)
                assert judge(pair, client) is here
                now = podman.inspect(here)
                for key in ("Id", "Name", "Image", "ImageName", "Config", "OCIRuntime"):
                    assert now[key] == before[key], key
                assert now["HostConfig"] == before["HostConfig"]
                assert podman.images(here) == [image]
                file = f"/proc/sys/{setting.replace('.', '/')}"
                assert here.run("podman", "exec", podman.NAME, "cat", file) == "77\n"


def lines(host: Host) -> list[int]:
    """The numbers that the counting container has printed."""
    text = host.run("podman", "logs", podman.NAME)
    return [int(line.split()[1]) for line in text.splitlines()]


def test_output_shared_memory_and_changes_of_the_image_move(both: Lab) -> None:
    podman.start(both.a, *ISOLATED, "--volume=data:/data", script=COUNTING)
    wait_until(lambda: len(lines(both.a)) > 10, "it counts")
    pings = ("podman", "exec", podman.NAME, "cat", "/proc/sys/net/ipv4/ping_group_range")
    before = both.a.run(*pings)
    done = migrate(both, both.a)
    assert done.code == 0, done.errors
    assert only_side(both) is both.b
    flags = both.b.run("podman", "exec", podman.NAME, "cat", "/sys/class/net/lo/flags")
    assert int(flags, 16) & 1, "lo is down"
    known = len(lines(both.b))
    assert both.b.run(*pings) == before, "a setting of the network's namespace is lost"
    wait_until(lambda: len(lines(both.b)) > known, "it goes on counting")
    numbers = lines(both.b)
    assert numbers == list(range(1, len(numbers) + 1)), "a line is lost, or twice there"
    inside = both.b.run("podman", "exec", podman.NAME, "cat", "/etc/changed", "/dev/shm/left")
    assert inside == "changed\nshared\n"
    assert "note" not in both.b.run("podman", "exec", podman.NAME, "ls", "/etc").split()
    counted = both.b.run("podman", "exec", podman.NAME, "cat", "/dev/shm/open").split()
    assert counted == [str(n) for n in range(1, len(counted) + 1)], "the open file has a hole"
    assert "Does not move" not in done.out + done.errors
    assert "C /etc" in both.b.run("podman", "diff", podman.NAME)
    assert not debris(both.a, runs_here=False)


def volume_of(host: Host) -> Path:
    return host.outside(podman.inspect(host, "volume", podman.VOLUME)["Mountpoint"])


def own_volume(host: Host) -> None:
    """Give the volume's folder an owner, as a database does."""
    os.chown(volume_of(host), 7, 8)
    volume_of(host).chmod(0o1750)


def check_own_volume(host: Host) -> None:
    """Podman has not given it another one, as it does for a new volume."""
    found = volume_of(host).stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (7, 8, 0o1750)


def test_without_live_it_is_stopped_and_started_on_the_other_host(both: Lab) -> None:
    script = "echo $(cat /data/runs 2>/dev/null) run >/data/runs; exec sleep 600"
    options = ("--volume=data:/data", "--restart=always", "--stop-timeout=1")
    podman.start(both.a, *ISOLATED, *options, "--volume=data:/again", script=script)
    own_volume(both.a)
    word = ["pyploop", "migrate", "--config", container.PYPLOOP_CONFIG, "b", WORD]
    both.a.run(*word, timeout=moving.SECONDS)
    assert only_side(both) is both.b
    runs = both.b.run("podman", "exec", podman.NAME, "cat", "/data/runs")
    assert runs == "run run\n"
    assert not debris(both.a, runs_here=False)
    # It was started by Podman from what it was created with, and is as fit to move as before.
    both.b.run("podman", "restart", podman.NAME)
    check_own_volume(both.b)
    done = migrate(both, both.b)
    assert done.code == 0, done.errors
    both.a.run("podman", "restart", podman.NAME)
    check_own_volume(both.a)
    spec = json.loads(both.a.outside(podman.inspect(both.a)["OCIConfigPath"]).read_text())
    points = [m["destination"] for m in spec["mounts"]]
    assert sorted(points) == sorted(set(points)), "something is mounted twice"


def test_bind_mounts_move_where_the_configuration_says_so(both: Lab) -> None:
    for host in (both.a, both.b):
        with host.outside(container.PYPLOOP_CONFIG).open("a") as f:
            f.write('[podman]\nbinds = ["/srv/moves"]\nexternal = ["/srv/link"]\n')
        host.outside("/srv/stays").mkdir()
        host.outside("/srv/link").symlink_to("stays")
        host.outside("/srv/stays/host").write_text(host.name)
    folder = both.a.outside("/srv/moves/data")
    folder.mkdir(parents=True)
    (folder / "file").write_text("moved")
    binds = ("--volume=/srv/moves/data:/data", "--volume=/srv/link:/stays:ro")
    podman.start(both.a, *ISOLATED, *binds, script=FOREVER)
    try:
        # One that does not even run would lose its folder.
        create = ("podman", "create", "--name=another", "--volume=/srv/moves:/all")
        both.a.run(*create, podman.IMAGE, "sh")
        done = migrate(both, both.a)
        assert done.code == 15 and "another, too (/srv/moves)" in done.errors
        refused = [e["check"] for e in done.events if e["event"] == "check-failed"]
        assert refused == ["podman-shared"]
        both.a.run("podman", "rm", "another")
        done = migrate(both, both.a)
        assert done.code == 0, done.errors
        seen = both.b.run("podman", "exec", podman.NAME, "cat", "/data/file", "/stays/host")
        assert seen == "movedb"
        assert not folder.exists()
    finally:
        podman.remove(both.b)
        for host in (both.a, both.b):
            host.run("rm", "-rf", "/srv/moves", "/srv/stays", "/srv/link")


def test_with_r_no_it_stays_stopped_under_another_name(both: Lab) -> None:
    podman.start(both.a, *ISOLATED, "--volume=data:/data", "--restart=always", script=FOREVER)
    done = migrate(both, both.a, "-r", "no")
    assert done.code == 0, done.errors
    assert podman.states(both.b) == {podman.NAME: "running"}
    assert podman.states(both.a) == {f"{podman.NAME}.migrated": "exited"}
    assert podman.volumes(both.a) == [podman.VOLUME]
    back = migrate(both, both.b)
    assert back.code == 9, back.errors
    assert "on this host already" in back.errors
    assert podman.states(both.b) == {podman.NAME: "running"}


REFUSED: dict[str, tuple[tuple[str, ...], dict[tuple[str, str], str]]] = {
    "what both hosts lack or have": (
        (
            *("--rm", "--label=PODMAN_SYSTEMD_UNIT=web.service", "--volume=tmp:/tmp"),
            *("--volume=/srv:/srv", "--network=only", "--network=vlan", "--secret=word"),
            *("--publish=2222:22", "--volume=taken:/data", "--volume=mounted:/mounted"),
            *(f"--network=lan:ip={CONTAINER_IP}", "--network=differs", "--tty"),
        ),
        {
            ("podman-systemd", ""): "the systemd unit web.service",
            ("podman-volume", ""): "the folder of the volume mounted",
            ("config-host", ""): "config.json has process.terminal",
            ("podman-link", ""): "not one end of a veth pair",
            ("podman-bind", ""): "/srv of this host is bound into ct",
            ("podman-volume", "b"): "has a volume taken on this host",
            ("podman-network", "b"): "none of the network differs on this host (10.80.0.0/24)",
            ("podman-secret", "b"): "no secret word on this host",
            ("podman-port", "b"): "cannot give it: Address already in use",
        },
    ),
    "what can be moved nowhere": (
        ("--pod=new:together", "--privileged"),
        {
            ("podman-pod", ""): "belongs to the pod",
            ("podman-privileged", ""): "is privileged",
        },
    ),
    "the host's network": (
        ("--network=host",),
        {
            ("network-namespace", ""): "uses the network of this host",
        },
    ),
    "another container, and users": (
        ("--requires=other", "--uidmap=0:100000:5000", *ISOLATED),
        {
            ("podman-dependencies", ""): "depends on other containers",
            ("podman-users", ""): "has a user namespace",
        },
    ),
    "an overlay, and the host's namespaces": (
        ("--volume=/etc:/mnt:O", "--pid=host", "--ipc=host", "--uts=host", *ISOLATED),
        {
            ("podman-mount", ""): "an overlay is mounted on /mnt",
            ("podman-namespaces", ""): "--pid host, --ipc host, --uts host",
        },
    ),
}
"""What a container has -> the checks that fail, on which host, and what they say."""


@pytest.fixture(scope="module")
def made(pair: Lab) -> Iterator[Lab]:
    """What the refused containers use."""
    with podman.hosts_with_podman(pair) as guest:
        podman.import_image(pair.a, guest)
        tmpfs = ("--opt", "type=tmpfs", "--opt", "device=tmpfs", "tmp")
        pair.a.run("podman", "volume", "create", *tmpfs)
        pair.b.run("podman", "volume", "create", "taken")
        pair.a.run("podman", "volume", "create", "mounted")
        folder = podman.STORAGE / "volumes/mounted/_data"
        pair.a.run("mount", "-t", "tmpfs", "tmpfs", folder)
        for host, subnet in ((pair.a, "10.79.0.0/24"), (pair.b, "10.80.0.0/24")):
            host.run("podman", "network", "create", f"--subnet={subnet}", "differs")
        podman.import_image(pair.b, guest)
        lodger = ("--network=lan", f"--ip={CONTAINER_IP}")
        podman.start(pair.b, *lodger, name="lodger", script=FOREVER)
        pair.a.run("podman", "network", "create", "--disable-dns", "only")
        vlan = ("-d", "macvlan", "-o", "parent=br0", "--subnet=10.78.0.0/24", "vlan")
        pair.a.run("podman", "network", "create", *vlan)
        pair.a.run("sh", "-c", "echo secret | podman secret create word -")
        port = subprocess.Popen(pair.b.command("busybox", "nc", "-l", "-p", "2222"))
        yield pair
        for pid, line in pair.b.processes().items():
            if "nc -l" in line:
                pair.b.run("kill", pid)
        port.wait()
        pair.a.run("podman", "secret", "rm", "word")
        pair.a.run("umount", folder, check=False)  # `both` may have done it


@pytest.fixture
def empty(made: Lab) -> Iterator[Lab]:
    yield made
    podman.remove_containers(made.a)


@pytest.mark.parametrize("what", REFUSED)
def test_all_that_stands_in_the_way_is_named_before_anything_starts(empty: Lab, what: str) -> None:
    options, wanted = REFUSED[what]
    host = empty.a
    if "--requires=other" in options:
        podman.start(host, *ISOLATED, name="other", script=FOREVER)
    podman.start(host, *options, script=FOREVER)
    done = migrate(empty, host)
    failed: dict[tuple[str, str], str] = {}
    for e in done.events:
        if e["event"] == "check-failed":
            assert e["hint"], e
            key = (e["check"], e["host"])
            failed[key] = failed.get(key, "") + e["message"]
    assert {k for k in wanted if k not in failed} == set(), done.errors
    assert failed.keys() - wanted.keys() == set(), done.errors
    for key, words in wanted.items():
        assert words in failed[key], (key, failed[key])
    assert "the migration has changed nothing on either host" in done.errors
    assert done.code == 15
    assert podman.states(host)[podman.NAME] == "running"
    assert podman.states(empty.b) == {"lodger": "running"}
    assert not debris(empty.b, runs_here=False).get("files")
    if "b" in {where for _, where in wanted} and not any("none" in o for o in options):
        assert "no network only on this host" in failed["podman-network", "b"]
        assert (
            f"lodger of this host has the address {CONTAINER_IP}" in failed["podman-network", "b"]
        )
        assert "the volume tmp is not a plain folder" in failed["podman-volume", ""]


def test_without_trust_podman_s_containers_do_not_come_stopped_either(both: Lab) -> None:
    config = both.b.outside(container.PYPLOOP_CONFIG)
    config.write_text(config.read_text().replace("live =", "live = [] #"))
    podman.start(both.a, *ISOLATED, script=FOREVER)
    word = ["pyploop", "migrate", "--config", container.PYPLOOP_CONFIG, "b", WORD]
    with pytest.raises(RuntimeError, match="takes no containers of Podman from"):
        both.a.run(*word)
    assert podman.states(both.a) == {podman.NAME: "running"}


def test_a_pause_by_somebody_else_ends_the_migration_and_podman_knows_that_it_goes_on(
    both: Lab,
) -> None:
    script = "head -c 600000 /dev/urandom >/data/much; " + FOREVER
    podman.start(both.a, *ISOLATED, "--volume=data:/data", script=script)
    with moving.migration(both, both.a, "--bwlimit=400K", name=WORD) as one:
        wait_until(lambda: one.phase() == "first pass", "the copy has begun", 40)
        both.a.run("podman", "pause", podman.NAME)
        done = one.wait()
    assert done.code == 8 and "was paused during the migration" in done.errors
    assert podman.states(both.a) == {podman.NAME: "running"}
    assert both.a.run("podman", "exec", podman.NAME, "cat", "/etc/note") == "image\n"
    assert not debris(both.b, runs_here=False).get("files")


def test_the_prefix_and_the_option_name_the_same_runtime(both: Lab) -> None:
    podman.start(both.a, *ISOLATED, script=FOREVER)
    images = both.a.outside(podman.inspect(both.a)["StaticDir"]) / "checkpoint"
    images.mkdir()
    (images / "inventory.img").write_text("a user's")
    for word in ((WORD,), ("--runtime=podman", podman.NAME)):
        command = ["pyploop", "migrate", "--live", "--check-only"]
        options = ["--config", container.PYPLOOP_CONFIG, *word[:-1]]
        both.a.run(*command, *options, "b", word[-1], timeout=moving.SECONDS)
    assert Path(WORD).name == WORD
    assert (images / "inventory.img").read_text() == "a user's"
    identity = podman.inspect(both.a)["Id"]
    refused = moving.migrate(both, both.a, "--check-only", name=identity)
    assert refused.code == 15 and "is a container of Podman" in refused.errors
    refused = moving.migrate(both, both.a, "--check-only", name=f"podman:{identity[:12]}")
    assert refused.code == 15 and f"name it: {WORD}" in refused.errors
