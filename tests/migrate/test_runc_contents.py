# SPDX-License-Identifier: Apache-2.0
"""All that a runc container has moves, or is refused before anything starts, or is
said to stay behind: its root, mounts, processes, limits, namespaces (docs/internals/safety.md)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import support
from gates import gates
from lab import container, hosts, requirements
from lab.hosts import Host, Lab
from moving import Outcome, kill, migrate, migration, only_side, recover

SOURCE = Path(__file__).with_name("tool.c")
BUNDLE, ROOTFS = container.BUNDLE, container.ROOTFS


@dataclass
class Scene:
    """Two hosts; a container whose root is a directory, and which `start` makes anew."""

    lab: Lab
    tool: Path

    def start(
        self, change: dict[str, Any] | None = None, *, also: str = "", folders: Sequence[str] = ()
    ) -> None:
        """On a, with this in its config.json; also: more of each host's configuration.
        folders: are there before."""
        self.remove()
        configure(self, also, self.lab.a, self.lab.b)
        a = self.lab.a
        for folder in folders:
            a.outside(folder).mkdir(parents=True)
        container.write_bundle(a)
        path = a.outside(BUNDLE / "config.json")
        config = merged(json.loads(path.read_text()), change or {})
        config["process"]["args"] = config["process"].get("argv") or ["/tool", "child"]
        config["process"].pop("argv", None)
        path.write_text(json.dumps(config))
        for root in {a.outside(ROOTFS), a.outside(BUNDLE / config["root"]["path"])}:
            root.mkdir(parents=True, exist_ok=True)
            for folder in ("data", "proc", "dev", "sys", "tmp"):
                (root / folder).mkdir(exist_ok=True)
            shutil.copy2(self.tool, root / "tool")
        container.start(a)
        children = config["process"]["args"] == ["/tool", "child"]
        name = "tool pause" if children else "/tool"
        support.wait_until(lambda: self.processes(a, name), "it runs")

    def processes(self, host: Host, beginning: str = "") -> dict[int, str]:
        """The container's, on this host."""
        names = beginning or ("/tool", "tool ")
        return {p: c for p, c in host.processes().items() if c.startswith(names)}

    def remove(self) -> None:
        for host in (self.lab.a, self.lab.b):
            container.remove(host)
            for point in [m for m in host.mounts() if m.startswith("/srv/")][::-1]:
                host.run("umount", "-l", point)
            host.run("sh", "-c", "rm -rf --one-file-system /srv/*")
            host.outside("/srv").chmod(0o755)
            container.write_pyploop_config(host, tree=True)

    def exec(self, *words: str, host: Host | None = None) -> None:
        """As `runc exec`, until it has begun, or ended."""
        null = subprocess.DEVNULL
        command = ["runc", "exec", "--cap", "CAP_SYS_ADMIN", "--cap", "CAP_DAC_OVERRIDE"]
        command += ["-d"] if words[0] == "pause" else []
        done = subprocess.run(
            (host or self.lab.a).command(*command, container.NAME, "/tool", *words),
            stdin=null,
            stdout=null,
            stderr=subprocess.PIPE if words[0] == "mount" else null,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, (words, done.stderr)

    def refused(self, code: int, *named: str, live: bool = True) -> str:
        """A migration that changes nothing; what it said."""
        done = migrate(self.lab, self.lab.a) if live else self.stopped()
        assert done.code == code, (done.code, done.errors)
        for name in named:
            assert name in done.errors, done.errors
        assert only_side(self.lab) is self.lab.a
        assert not self.lab.b.outside(BUNDLE).exists()
        assert self.lab.a.outside(ROOTFS / "tool").exists()
        return done.errors

    def moves(self, *options: str) -> Outcome:
        done = migrate(self.lab, self.lab.a, *options)
        assert done.code == 0, done.errors
        assert only_side(self.lab) is self.lab.b
        return done

    def stopped(self) -> Outcome:
        """A migration without --live."""
        words = ["pyploop", "migrate", "--config", container.PYPLOOP_CONFIG]
        done = subprocess.run(
            self.lab.a.command(*words, self.lab.b.name, container.NAME),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr, [])


def merged(config: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Dictionaries are merged, lists joined, others replaced."""
    for key, value in change.items():
        old = config.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merged(old, value)
        elif isinstance(value, list) and isinstance(old, list) and key != "argv":
            config[key] = old + value
        else:
            config[key] = value
    return config


@pytest.fixture(scope="module")
def hosts_with_tool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    requirements.check()
    support.needs("gcc", "rsync")
    tool = tmp_path_factory.mktemp("tool") / "tool"
    support.run("gcc", "-O1", "-Wall", "-Werror", "-static", "-o", tool, SOURCE)
    with hosts.lab() as lab:
        yield Scene(lab, tool)


@pytest.fixture
def scene(hosts_with_tool: Scene) -> Iterator[Scene]:
    yield hosts_with_tool
    hosts_with_tool.remove()
    assert not hosts_with_tool.processes(hosts_with_tool.lab.a)
    assert not hosts_with_tool.processes(hosts_with_tool.lab.b)


# ---- the root


def test_a_root_that_something_hides_is_refused_by_both_names(scene: Scene) -> None:
    scene.start()
    a = scene.lab.a
    a.run("mount", "-t", "tmpfs", "none", ROOTFS)
    (a.outside(ROOTFS) / "tool").touch()
    for live in (True, False):
        scene.refused(15, f"is not {ROOTFS}", live=live)
    a.run("umount", ROOTFS)
    scene.moves()


def test_a_root_on_an_overlay_is_refused_with_what_to_write(scene: Scene) -> None:
    a = scene.lab.a
    scene.start()
    container.remove(a)
    merged_root = BUNDLE / "merged"
    a.run("mkdir", "-p", merged_root, BUNDLE / "upper", BUNDLE / "work")
    words = f"lowerdir={ROOTFS},upperdir={BUNDLE}/upper,workdir={BUNDLE}/work"
    a.run("mount", "-t", "overlay", "-o", words, "overlay", merged_root)
    path = a.outside(BUNDLE / "config.json")
    config = json.loads(path.read_text())
    config["root"]["path"] = "merged"
    path.write_text(json.dumps(config))
    container.start(a)
    for live in (True, False):
        scene.refused(15, str(merged_root), "[[container.NAME.tree]]", live=live)
    a.run("umount", "-l", merged_root)


def test_a_root_that_config_json_gives_by_a_relative_path_moves_to_the_target_s(
    scene: Scene,
) -> None:
    """Which would look for it in its bundle, where there is none, or an empty one."""
    scene.start({"root": {"path": "rootfs"}})
    b = scene.lab.b
    path = b.outside(container.PYPLOOP_CONFIG)
    path.write_text(path.read_text().replace(str(ROOTFS), "/srv/elsewhere/root"))
    done = scene.stopped()
    assert done.code == 0, done.errors
    config = json.loads(b.outside(BUNDLE / "config.json").read_text())
    assert config["root"]["path"] == "/srv/elsewhere/root"
    assert only_side(scene.lab) is b


def bind(source: str, destination: str = "/data") -> dict[str, Any]:
    options = ["rbind", "rw"]
    return {"destination": destination, "type": "bind", "source": source, "options": options}


def test_no_room_for_the_dump_on_the_source_is_found_by_the_checks(scene: Scene) -> None:
    scene.start()
    a = scene.lab.a
    a.run("mkdir", "/srv/small")
    a.run("mount", "-t", "tmpfs", "-o", "size=16k", "none", "/srv/small")
    path = a.outside(container.PYPLOOP_CONFIG)
    path.write_text('images_dir = "/srv/small"\n' + path.read_text())
    scene.refused(6, "/srv/small has no room")
    done = migrate(scene.lab, a, "--check-only")
    assert (done.code, "/srv/small has no room" in done.errors) == (6, True), done.errors


# ---- mounts of config.json


def test_a_bind_from_elsewhere_is_refused_until_it_is_external_or_a_tree(scene: Scene) -> None:
    a, b = scene.lab.a, scene.lab.b
    shared = "/srv/shared"
    scene.start({"mounts": [bind(shared)]}, folders=[shared])
    for live in (True, False):
        scene.refused(15, shared, "[[container.NAME.tree]]", "external = [", live=live)
    external = f'external = ["{shared}"]\n'
    configure(scene, external, a)
    scene.refused(15, "1", "external")  # the target says nothing of it
    configure(scene, external, a, b)
    scene.refused(15, shared, "No such file")
    b.outside(shared).touch()
    scene.refused(
        15, f"{shared} is a file on this host, but a folder on the source", "(check external)"
    )
    b.outside(shared).unlink()
    b.outside(shared).mkdir()
    (b.outside(shared) / "of-b").touch()
    scene.moves()
    (pid, *_) = scene.processes(b)
    assert b.run("ls", f"/proc/{pid}/root/data").split() == ["of-b"]


def configure(scene: Scene, also: str, *where: Host) -> None:
    for host in where:
        container.write_pyploop_config(host, tree=True)
        path = host.outside(container.PYPLOOP_CONFIG)
        keys = f"[container.{container.NAME}]\n"
        path.write_text(path.read_text().replace(keys, f"{keys}stop_timeout = 0.1\n{also}"))


def test_data_in_a_second_directory_that_is_bound_move_with_it(scene: Scene) -> None:
    a, b = scene.lab.a, scene.lab.b
    data = "/srv/data"
    scene.start({"mounts": [bind(data), bind(f"{data}/one", "/tmp/one")]}, folders=[f"{data}/one"])
    (a.outside(data) / "file").write_text("the container's")
    for host in (a, b):
        with host.outside(container.PYPLOOP_CONFIG).open("a") as f:
            f.write(f'[[container.{container.NAME}.tree]]\npath = "{data}"\n')
    a.outside(f"{data}/one").rename(a.outside(f"{data}/two"))
    scene.refused(15, f"{data}/one", "does not exist")
    a.outside(f"{data}/one").mkdir()
    scene.refused(15, "/tmp/one")  # the container has the old one
    a.outside(f"{data}/one").rmdir()
    a.outside(f"{data}/two").rename(a.outside(f"{data}/one"))
    scene.refused(15, "could reach /srv/data", "chmod 0700 /srv on this host")
    b.outside("/srv").chmod(0o700)
    scene.moves()
    (pid, *_) = scene.processes(b)
    assert b.run("cat", f"/proc/{pid}/root/data/file") == "the container's"
    assert not a.outside(f"{data}/file").exists()


def test_binds_on_a_link_of_its_root_and_from_the_bundle_are_compared_too(scene: Scene) -> None:
    """/var/run is one in most images; a source may be relative to the bundle."""
    a, b = scene.lab.a, scene.lab.b
    shared, volume = "/srv/shared", BUNDLE / "volumes/one"
    also = f'external = ["{shared}"]\n'
    scene.start(also=also, folders=[shared, str(volume)])
    container.remove(a)
    (a.outside(ROOTFS) / "var").mkdir()
    (a.outside(ROOTFS) / "var/run").symlink_to("/tmp")
    path = a.outside(BUNDLE / "config.json")
    binds = [bind(shared, "/var/run/shared"), bind("volumes/one", "/var/run/one")]
    path.write_text(json.dumps(merged(json.loads(path.read_text()), {"mounts": binds})))
    for host in (a, b):
        with host.outside(container.PYPLOOP_CONFIG).open("a") as f:
            f.write(f'[[container.{container.NAME}.tree]]\npath = "{volume.parent}"\n')
    b.outside(shared).mkdir()
    container.start(a)
    support.wait_until(lambda: scene.processes(a, "tool pause"), "it runs")
    (a.outside(volume) / "file").write_text("the container's")
    a.outside(volume).rename(a.outside(volume.with_name("two")))
    a.outside(volume).mkdir()
    scene.refused(15, "/tmp/one in the container", "restart the container")
    a.outside(volume).rmdir()
    a.outside(volume.with_name("two")).rename(a.outside(volume))
    scene.moves()
    (pid, *_) = scene.processes(b)
    assert b.run("cat", f"/proc/{pid}/root/tmp/one/file") == "the container's"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"process": {"terminal": True}}, "process.terminal"),
        ({"mounts": [{"destination": "/data", "type": "ext4", "source": "/dev/vdb"}]}, "/dev/vdb"),
        ({"linux": {"namespaces": [{"type": "ipc", "path": "/proc/1/ns/ipc"}]}}, "ipc namespace"),
        ({"linux": {"resources": {"cpu": {"cpus": "0,700"}}}}, "700"),
        (
            {"linux": {"devices": [{"path": "/dev/d", "type": "b", "major": 7, "minor": 9}]}},
            "block device 7:9",
        ),
        ({"linux": {"sysctl": {"net.core.somaxconn": "333"}}}, "net.core.somaxconn is 4096"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_configuration_that_only_fits_this_host_is_refused(
    scene: Scene, change: dict[str, Any], named: str
) -> None:
    """Written after the container was started: runc itself would refuse some."""
    scene.start()
    path = scene.lab.a.outside(BUNDLE / "config.json")
    path.write_text(json.dumps(merged(json.loads(path.read_text()), change)))
    if "net." in named:
        setting = named.split(" ", 1)[0]
        scene.refused(15, f'add "{setting}" to sysctls in [container.{container.NAME}.policy]')
        configure(scene, f'policy = {{ sysctls = ["{setting}"] }}\n', scene.lab.b)
    scene.refused(15, named)
    if "net." not in named:  # which a start sets by itself
        scene.refused(15, named, live=False)


def test_a_network_namespace_that_is_not_there_is_refused(scene: Scene) -> None:
    scene.start()
    path = scene.lab.b.outside(container.PYPLOOP_CONFIG)
    path.write_text(path.read_text().replace("/run/netns/ct", "/run/netns/other"))
    scene.refused(15, "/run/netns/other", "does not exist on this host")


# ---- mounts made within it


def test_a_tmpfs_made_within_it_moves_and_other_mounts_are_refused(scene: Scene) -> None:
    b = scene.lab.b
    scene.start()
    scene.exec("mount", "none", "/tmp", "tmpfs", "")
    scene.exec("mount", "/data", "/tmp/bound", "bind", "")
    for folder in ("upper", "work"):
        scene.lab.a.outside(ROOTFS / "data" / folder).mkdir()
    scene.exec("mount", "/data", "/tmp/again", "bind", "")
    words = "lowerdir=/dev,upperdir=/data/upper,workdir=/data/work"
    scene.exec("mount", "overlay", "/tmp/over", "overlay", words)
    scene.refused(15, "/tmp/over", "overlay", "Check mounted failed")
    scene.start()
    scene.exec("mount", "none", "/tmp", "tmpfs", "")
    scene.exec("mount", "/data", "/tmp/bound", "bind", "")
    (pid, *_) = scene.processes(scene.lab.a)
    scene.lab.a.run("sh", "-c", f"echo kept >/proc/{pid}/root/tmp/file")
    scene.moves()
    (pid, *_) = scene.processes(b)
    assert b.run("cat", f"/proc/{pid}/root/tmp/file") == "kept\n"
    assert "/tmp/bound" in b.run("cat", f"/proc/{pid}/mountinfo")


_LOOSEN = """#!/usr/bin/python3
import ctypes, os
if os.environ["CRTOOLS_SCRIPT_ACTION"] == "post-restore":
    libc = ctypes.CDLL(None)
    with open(f"/proc/{os.environ['CRTOOLS_INIT_PID']}/ns/mnt") as namespace:
        assert libc.setns(namespace.fileno(), 0x20000) == 0
    remount_bind = ctypes.c_ulong(32 | 4096)
    assert libc.mount(None, b"/proc/sys", None, remount_bind, None) == 0
"""
"""What makes a read-only mount of the restored container writable."""


def test_a_mount_that_criu_restores_writable_is_read_only_before_the_container_runs(
    scene: Scene,
) -> None:
    b = scene.lab.b
    scene.start()
    b.outside("/srv/loosen").write_text(_LOOSEN)
    b.outside("/srv/loosen").chmod(0o755)
    b.outside("/srv/loosen.conf").write_text("action-script /srv/loosen\n")
    program = b.folder / "bin" / "criu"
    real = program.readlink()
    program.unlink()
    program.write_text(f'#!/bin/sh\nCRIU_CONFIG_FILE=/srv/loosen.conf exec {real} "$@"\n')
    program.chmod(0o755)

    def options(host: Host) -> list[str]:
        (pid, *_) = scene.processes(host)
        lines = host.run("cat", f"/proc/{pid}/mountinfo").splitlines()
        (found,) = [line.split()[5] for line in lines if line.split()[4] == "/proc/sys"]
        return found.split(",")

    try:
        before = options(scene.lab.a)
        assert "ro" in before
        scene.moves()
        assert options(b) == before
    finally:
        program.unlink()
        program.symlink_to(real)


# ---- processes


def test_a_process_has_the_same_rights_after_the_move(scene: Scene) -> None:
    """Without supplementary groups it does not get those of who restores it."""
    scene.start()

    def rights(host: Host) -> list[list[str]]:
        found = []
        for pid in sorted(scene.processes(host)):
            lines = host.outside(f"/proc/{pid}/status").read_text().splitlines()
            names = ("Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp", "Umask")
            found.append([line.rstrip() for line in lines if line.startswith(names)])
        return found

    before = rights(scene.lab.a)
    assert all("Groups:" in lines for lines in before)
    scene.moves()
    assert rights(scene.lab.b) == before


def test_a_process_of_runc_exec_is_named_and_nothing_starts(scene: Scene) -> None:
    scene.start()
    scene.exec("pause")
    said = scene.refused(8, "runc exec", "(/tool pause)", "--drop-exec")
    assert "child" not in said
    done = scene.moves("--drop-exec")
    assert "dropped (--drop-exec)" in done.out and "(/tool pause)" in done.out
    assert sorted(scene.processes(scene.lab.b).values()) == ["/tool child", "tool pause"]


def test_a_process_of_runc_exec_in_a_cgroup_below_is_named_too(scene: Scene) -> None:
    scene.start()
    scene.exec("pause")
    a = scene.lab.a
    (pid,) = scene.processes(a, "/tool pause")
    a.run("sh", "-c", f"mkdir {freezer(a)}/sub; echo {pid} >{freezer(a)}/sub/cgroup.procs")
    scene.refused(8, f"{pid} (/tool pause)")


def test_a_process_that_was_moved_out_of_the_cgroup_is_named(scene: Scene) -> None:
    scene.start()
    a = scene.lab.a
    (pid,) = scene.processes(a, "tool pause")
    a.run("sh", "-c", f"echo {pid} >{freezer(a)}/../cgroup.procs")
    for options in ((), ("--drop-exec",)):
        done = migrate(scene.lab, a, *options)
        assert done.code == 8, done.errors
        assert f"another cgroup, and would not be suspended: {pid} (tool pause)" in done.errors
    a.run("sh", "-c", f"echo {pid} >{freezer(a)}/cgroup.procs")
    scene.moves()


def freezer(host: Host) -> str:
    record = json.loads(host.outside(f"/run/runc/{container.NAME}/state.json").read_text())
    paths = record["cgroup_paths"]
    return str(paths.get("freezer") or paths[""])


def test_one_that_enters_its_namespace_from_outside_is_named(scene: Scene) -> None:
    scene.start()
    a = scene.lab.a
    (init,) = scene.processes(a, "/tool child")
    command = ["nsenter", "-t", str(init), "--pid", "sleep", "600"]
    with subprocess.Popen(a.command(*command), stdin=subprocess.DEVNULL) as inside:
        try:
            support.wait_until(lambda: "sleep 600" in a.processes().values(), "it has entered")
            scene.refused(8, "another cgroup", "(sleep 600)")
        finally:
            inside.kill()
            kill(a, "sleep 600")
    scene.moves()


def test_a_process_of_runc_exec_that_comes_during_the_copy_undoes_the_suspension(
    scene: Scene,
) -> None:
    scene.start()
    lab = scene.lab
    with gates(lab.b) as stops:
        stops.close_gate("link-down-before")
        with migration(lab, lab.a) as moving:
            stops.wait("link-down-before")
            scene.exec("pause")
            stops.open_gate("link-down-before")
            done = moving.wait()
    assert done.code == 8, done.errors
    assert "(/tool pause)" in done.errors
    assert only_side(lab) is lab.a
    assert not recover(lab.a).strip()
    kill(lab.a, "/tool pause")
    scene.moves()


# ---- what stays behind, and is said


def test_what_no_checkpoint_holds_is_said_and_the_container_moves(scene: Scene) -> None:
    a, b = scene.lab.a, scene.lab.b
    scene.start({"process": {"argv": ["/tool", "pin", "1"]}})
    a.run("runc", "update", "--memory", "100000000", container.NAME)
    a.run("runc", "update", "--pids-limit", "77", container.NAME)
    (pid,) = scene.processes(a)
    a.run("ionice", "-c", "2", "-n", "7", "-p", pid)
    said = [x for x in scene.moves().out.splitlines() if x.startswith("Does not move: ")]
    assert any("pids.max is 77" in x for x in said), said
    assert any(x.startswith("Does not move: memory.") and "is 99999744" in x for x in said), said
    assert any("the CPUs (1 of " in x and "(/tool pin 1)" in x for x in said), said
    assert any("the I/O priority" in x for x in said), said
    assert len(said) == 4
    # That is so: should it move one day, nothing needs to be said.
    (there,) = scene.processes(b)
    assert "prio 7" not in b.run("ionice", "-p", there)
    scene.start()
    assert "Does not move" not in scene.moves().out


def test_what_a_checkpoint_forgets_of_processes_and_sockets_is_said(scene: Scene) -> None:
    a, b = scene.lab.a, scene.lab.b
    scene.start({"process": {"argv": ["/tool", "unusual"]}})
    (pid,) = scene.processes(a)
    support.wait_until(lambda: joined(a, pid), "it has joined the group")
    said = [x for x in scene.moves().out.splitlines() if x.startswith("Does not move: ")]
    who = f" of process {pid} (/tool unusual)"
    assert sorted(said) == [
        "Does not move: membership in multicast groups (239.1.2.234)",
        f"Does not move: the personality (00040000){who}",
        f"Does not move: the socket option IP_MULTICAST_TTL (5){who}",
        f"Does not move: the socket option TCP_USER_TIMEOUT (9999){who}",
    ]
    (there,) = scene.processes(b)
    assert b.outside(f"/proc/{there}/personality").read_text() == "00000000\n"
    assert not joined(b, there)


def joined(host: Host, pid: int) -> bool:
    """Whether the group 239.1.2.234 is, in the process's network."""
    return "EA0201EF" in host.outside(f"/proc/{pid}/net/igmp").read_text()


def test_children_that_have_ended_and_nobody_waits_for_move(scene: Scene) -> None:
    scene.start({"process": {"argv": ["/tool", "zombies"]}})
    support.wait_until(lambda: zombies(scene.lab.a) == 3, "they have ended")
    scene.moves()
    assert zombies(scene.lab.b) == 3


def zombies(host: Host) -> int:
    return host.run("ps", "-eo", "stat=,comm=").count("Z    tool")


def test_events_and_datagrams_that_wait_at_the_suspension_are_said(scene: Scene) -> None:
    scene.start({"process": {"argv": ["/tool", "unread"]}})
    said = [x for x in scene.moves().out.splitlines() if x.startswith("Does not move: ")]
    assert len(said) == 2, said
    assert said[0].startswith("Does not move: events that wait for process ")
    assert said[1] == "Does not move: datagrams that wait in UDP sockets (1 of them)"


def test_a_pipe_to_a_program_outside_is_said(scene: Scene) -> None:
    scene.start()
    a = scene.lab.a
    container.remove(a)
    command = a.command("runc", "run", "-d", "-b", BUNDLE, container.NAME)
    null = subprocess.DEVNULL
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=null) as logger:
        subprocess.run(command, stdin=null, stdout=logger.stdin, stderr=null, check=True)
        a.run("sh", "-c", container.LINK_UP)
        done = scene.moves()
        assert logger.stdin is not None
        logger.stdin.close()
    assert "descriptor 1 of process" in done.out and "a pipe whose other end" in done.out
