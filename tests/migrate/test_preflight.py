# SPDX-License-Identifier: Apache-2.0
"""What would make a dump or a restore fail is found before anything starts, and named.  And
what CRIU can dump is not refused."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from lab import container, hosts, requirements
from lab.hosts import Host
from moving import Outcome, migrate, only_side
from test_runc_contents import BUNDLE, ROOTFS, SOURCE, Scene, bind, configure

_ODD = Path(__file__).with_name("odd.c")
_CAPABILITIES = ["CAP_SYS_ADMIN", "CAP_NET_RAW", "CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"]
_SETS = ("bounding", "effective", "permitted")
_NO_IDS = [{"containerID": 0, "hostID": 100000, "size": 65536}]


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scene, Path, Path]]:
    requirements.check()
    support.needs("gcc", "rsync")
    folder = tmp_path_factory.mktemp("odd")
    for source, libraries in ((SOURCE, []), (_ODD, ["-lrt"])):
        program = folder / source.stem
        support.run("gcc", "-O1", "-Wall", "-Werror", "-static", "-o", program, source, *libraries)
    with hosts.lab() as lab:
        yield Scene(lab, folder / "tool"), folder / "tool", folder / "odd"


@pytest.fixture
def scene(tools: tuple[Scene, Path, Path]) -> Iterator[Scene]:
    one = tools[0]
    one.tool = tools[1]
    yield one
    one.remove()


def odd(
    scene: Scene,
    tools: tuple[Scene, Path, Path],
    *what: str,
    change: dict[str, Any] | None = None,
    also: str = "",
    folders: tuple[str, ...] = (),
) -> None:
    """A container whose process has all of this (odd.c)."""
    scene.tool = tools[2]
    process = {
        "argv": ["/tool", *what],
        "capabilities": {name: list(_CAPABILITIES) for name in _SETS},
    }
    policy = f"policy = {{ capabilities = {json.dumps([*_CAPABILITIES, *_USUAL])} }}\n"
    scene.start({"process": process, **(change or {})}, also=policy + also, folders=folders)
    state = scene.lab.a.outside(ROOTFS / "state")
    support.wait_until(lambda: state.exists() and state.read_text(), "it has all of it")
    assert state.read_text() == "ready\n", state.read_text()


_USUAL = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]


def failed(done: Outcome) -> list[tuple[str, str]]:
    """(check, host) of each check that has failed."""
    return [(e["check"], e["host"]) for e in done.events if e["event"] == "check-failed"]


def refused(scene: Scene, *options: str) -> dict[str, str]:
    """The checks that fail, each with its message; nothing was started."""
    done = migrate(scene.lab, scene.lab.a, *options)
    assert done.code, done.out
    assert "the migration has changed nothing on either host" in done.errors, done.errors
    assert only_side(scene.lab) is scene.lab.a
    found = {e["check"]: e for e in done.events if e["event"] == "check-failed"}
    assert all(e["hint"] for e in found.values()), found
    return {name: str(e["message"]) for name, e in found.items()}


@pytest.mark.parametrize("options", [["--check-only"], []])
def test_all_checks_that_fail_on_both_hosts_are_listed_and_nothing_starts(
    scene: Scene, options: list[str]
) -> None:
    a, b = scene.lab.a, scene.lab.b
    scene.start()
    (pid,) = scene.processes(a, "tool pause")
    a.run("kill", "-STOP", pid)
    scene.exec("pause")
    config = b.outside(container.PYPLOOP_CONFIG)
    config.write_text(config.read_text().replace('live = ["10.', 'live = ["11.'))
    b.outside("/srv/ct").mkdir(0o700)
    (b.outside("/srv/ct") / "config.json").touch()
    done = migrate(scene.lab, a, *options)
    assert failed(done) == [("stopped", ""), ("processes", ""), ("trust", "b"), ("exists", "b")]
    assert done.code == 8
    lines = done.errors.splitlines()
    assert lines[0].startswith("Check stopped failed: ") and f"run kill -CONT {pid}" in lines[0]
    assert lines[1].startswith("Check processes failed: ")
    assert lines[2].startswith("Check trust failed on b: this host takes no memory from")
    assert lines[3].startswith("Check exists failed on b: /srv/ct has a config.json already")
    assert lines[4].startswith("4 checks failed: stopped, processes, trust, exists; the migration")
    assert only_side(scene.lab) is a


# ---- what a process has


_REFUSED = {
    "uring": ("io-uring", "is of the kind io_uring"),
    "bpf-map": ("bpf", "is of the kind bpf-map"),
    "bpf-prog": ("bpf", "is of the kind bpf-prog"),
    "userfault": ("userfaultfd", "is of the kind userfaultfd"),
    "perf": ("anonymous-file", "is of the kind perf_event"),
    "landlock": ("anonymous-file", "is of the kind landlock-ruleset"),
    "packets": ("packet-pipe", "is a pipe of packets"),
    "secret": ("memfd-secret", "is secret memory"),
    "secret-map": ("memfd-secret", "a mapping of process"),
    "mqueue": ("posix-queues", "is the POSIX message queue /q"),
    "vsock": ("vsock", "is a vsock"),
    "xdp": ("socket-family", "is a socket of the family 44"),
    "mptcp": ("mptcp", "is a socket of MPTCP"),
    "netlink-data": ("netlink-data", "with data that it does not read"),
    "netlink:1": ("netlink-link-events", "gets changes of links"),
    "deleted-linked": ("deleted-file-linked", "/data/one, which was deleted"),
    "deleted-large:/data/large": ("deleted-file-size", "takes 2097152 bytes"),
    "pidns": ("nested-pid-namespace", "a pid namespace of its own"),
    "userns": ("nested-user-namespace", "a user namespace of its own"),
    "utsns": ("nested-uts-namespace", "a uts namespace of its own"),
    "ipcns": ("nested-ipc-namespace", "a ipc namespace of its own"),
    "netns": ("nested-network-namespace", "a net namespace of its own"),
    "cgroupns": ("nested-cgroup-namespace", "a cgroup namespace of its own"),
    "timens-exec": ("nested-time-namespace", "a time namespace of its own"),
}
"""What odd.c gets -> the check that finds it, and what that says."""
_MOVES = (
    *("netlink:0", "netlink:0x10", "raw", "packet", "udplite", "memfd", "pidfd", "aio", "nsfd"),
    *("unix-in", "unix-listen:/data/listen", "deleted", "deleted-sparse:/data/sparse"),
    *("deleted-cwd", "open:/dev/null", "open:/dev/ptmx", "mntns", "mntns-exec"),
)
"""What CRIU can dump, although one may doubt it."""


def test_what_criu_cannot_dump_of_a_process_is_named_before_anything_starts(
    scene: Scene, tools: tuple[Scene, Path, Path]
) -> None:
    missing = [w for w in _REFUSED if not there(w)]
    odd(scene, tools, *(w for w in _REFUSED if w not in missing))
    found = refused(scene)
    for what, (check, words) in _REFUSED.items():
        if what not in missing:
            assert words in found.get(check, ""), (what, found)
    assert set(found) == {c for w, (c, _) in _REFUSED.items() if w not in missing}


def there(what: str) -> bool:
    """Whether the kernel of this machine has it."""
    if what == "vsock":
        with contextlib.suppress(OSError):
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
            return True
        return False
    if what == "xdp":
        with contextlib.suppress(OSError):
            socket.socket(44, socket.SOCK_RAW).close()
            return True
        return False
    return what != "mptcp" or Path("/proc/sys/net/mptcp").exists()


def test_what_criu_can_dump_is_not_refused(scene: Scene, tools: tuple[Scene, Path, Path]) -> None:
    odd(scene, tools, *_MOVES)
    scene.moves()


# ---- what comes from outside


def restart(scene: Scene, stdin: Any, output: Any) -> None:
    a = scene.lab.a
    container.remove(a)
    command = a.command("runc", "run", "-d", "-b", BUNDLE, container.NAME)
    subprocess.run(command, stdin=stdin, stdout=output, stderr=output, timeout=30, check=True)
    a.run("sh", "-c", container.LINK_UP)
    support.wait_until(lambda: scene.processes(a, "tool pause"), "it runs")


def test_standard_output_on_a_file_or_terminal_of_the_host_is_named(
    scene: Scene, tmp_path: Path
) -> None:
    scene.start()
    terminal, other = pty.openpty()
    try:
        with (tmp_path / "log").open("w") as log:
            restart(scene, other, log)
        found = refused(scene)
    finally:
        os.close(terminal)
        os.close(other)
    assert set(found) == {"outside-file", "outside-terminal"}
    (first, *_) = scene.processes(scene.lab.a)
    assert f"descriptor 1 of process {first}" in found["outside-file"]
    assert str(tmp_path / "log") in found["outside-file"]
    assert "/dev/pts/" in found["outside-terminal"]


def test_sockets_that_were_made_outside_are_named(scene: Scene) -> None:
    scene.start()
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        restart(scene, listening, theirs)
        found = refused(scene)
    assert set(found) == {"outside-socket"}
    assert found["outside-socket"].count("made outside the container") >= 3


def test_a_connection_to_a_unix_socket_of_the_host_is_named(
    scene: Scene, tools: tuple[Scene, Path, Path]
) -> None:
    a, b = scene.lab.a, scene.lab.b
    shared = "/srv/shared"
    with socket.socket(socket.AF_UNIX) as listening:
        scene.tool = tools[2]

        def before(host: Host) -> None:
            with contextlib.chdir(host.outside(shared)):
                listening.bind("socket")
            listening.listen()
            start(host)

        start, container.start = container.start, before
        try:
            odd(
                scene,
                tools,
                "unix-out:/data/socket",
                "unix-out:/data/socket",
                change={"mounts": [bind(shared)]},
                also=f'external = ["{shared}"]\n',
                folders=(shared,),
            )
        finally:
            container.start = start
        b.outside(shared).mkdir()
        with listening.accept()[0]:  # the other one waits
            found = refused(scene)
    assert set(found) == {"outside-socket"}
    assert found["outside-socket"].count("whose other end is outside the container") == 2
    assert scene.processes(a)


@pytest.mark.parametrize("how", ["rslave", "rprivate"])
def test_a_mount_below_a_bind_is_named_and_what_comes_later_does_not_matter(
    scene: Scene, how: str
) -> None:
    a, b = scene.lab.a, scene.lab.b
    shared, sub = "/srv/shared", "/srv/shared/sub"

    def before(host: Host) -> None:
        for one in (a, b):
            for folder in (sub, "/srv/other"):
                one.outside(folder).mkdir(parents=True, exist_ok=True)
            one.run("mount", "--bind", shared, shared)
            one.run("mount", "--make-shared", shared)
            one.run("mount", "--bind", "/srv/other", sub)
        start(host)

    options = {"destination": "/data", "type": "bind", "source": shared, "options": ["rbind", how]}
    start, container.start = container.start, before
    try:
        scene.start({"mounts": [options]}, also=f'external = ["{shared}", "{sub}"]\n')
    finally:
        container.start = start
    found = refused(scene)
    assert set(found) == {"submount"}
    assert "is mounted on /data/sub in the container" in found["submount"]


# ---- users, CRIU's options, runc's options


def own_users(scene: Scene, *, network: bool) -> None:
    """The container has a user namespace.  network: and a network namespace of the host's."""

    def before(host: Host) -> None:
        path = host.outside(BUNDLE / "config.json")
        config = json.loads(path.read_text())
        unfit = ("sysfs", "cgroup") if network else ()
        config["mounts"] = [m for m in config["mounts"] if m["type"] not in unfit]
        for namespace in config["linux"]["namespaces"] if not network else ():
            namespace.pop("path", None)
        path.write_text(json.dumps(config))
        host.run("chown", "-R", "100000:100000", ROOTFS)
        host.run("chmod", "755", "/srv", BUNDLE)
        start(host)

    change = {
        "linux": {
            "namespaces": [{"type": "user"}],
            "uidMappings": _NO_IDS,
            "gidMappings": _NO_IDS,
        }
    }
    start, container.start = container.start, before
    try:
        scene.start(change)
    finally:
        container.start = start
    for host in (scene.lab.a, scene.lab.b) if not network else ():
        config = host.outside(container.PYPLOOP_CONFIG)
        lines = config.read_text().splitlines(keepends=True)
        config.write_text("".join(x for x in lines if not x.startswith(("netns", "link_"))))


def test_a_user_namespace_with_a_network_of_the_host_s_is_named(scene: Scene) -> None:
    own_users(scene, network=True)
    assert set(refused(scene)) == {"user-namespace-network"}


def test_a_container_with_users_and_a_network_of_its_own_moves(scene: Scene) -> None:
    own_users(scene, network=False)
    b = scene.lab.b
    b.outside("/srv").chmod(0o755)
    scene.moves()
    init = json.loads(b.run("runc", "state", container.NAME))["pid"]
    link = b.run("nsenter", f"--net=/proc/{init}/ns/net", "ip", "-o", "link", "show", "lo")
    assert "LOOPBACK,UP" in link, "127.0.0.1 is gone"


def test_criu_s_options_move_with_the_container_and_can_be_set(
    scene: Scene, tools: tuple[Scene, Path, Path]
) -> None:
    a, b = scene.lab.a, scene.lab.b

    def before(host: Host) -> None:
        host.outside(container.CRIU_CONFIG).write_text("network-lock skip\nghost-limit 8M\n")
        start(host)

    start, container.start = container.start, before
    try:
        odd(scene, tools, "deleted-large:/data/large")
    finally:
        container.start = start
    scene.moves()
    written = b.outside(container.CRIU_CONFIG).read_text()
    assert written == "network-lock skip\nghost-limit 8M\n"
    done = migrate(scene.lab, b)
    assert done.code == 0, done.errors
    assert a.outside(container.CRIU_CONFIG).read_text() == written


def test_options_that_runc_does_not_know_are_named_on_both_hosts(scene: Scene) -> None:
    options = 'options = ["--tcp-established", "--file-locks", "--no-such-option"]\n'
    scene.start(also=options)
    done = migrate(scene.lab, scene.lab.a)
    assert failed(done) == [("runc-options", ""), ("runc-options", "b")]
    assert done.errors.count("does not know --no-such-option") == 2
    configure(scene, "", scene.lab.a, scene.lab.b)


# ---- the target's kernel, and files


def test_other_cgroups_on_the_target_are_named(scene: Scene) -> None:
    scene.start()
    b = scene.lab.b
    if not Path("/sys/fs/cgroup/pids").exists():
        pytest.skip("this machine has cgroup v2 alone")
    b.run("umount", "/sys/fs/cgroup/pids")
    try:
        assert "controllers pids" in refused(scene)["cgroups"]
    finally:
        b.run("mount", "-t", "cgroup", "-o", "pids", "cgroup", "/sys/fs/cgroup/pids")
    b.run("mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")
    try:
        assert "cgroup v2, and the container uses v1" in refused(scene)["cgroups"]
    finally:
        b.run("umount", "/sys/fs/cgroup")


def test_what_the_target_s_kernel_and_root_cannot_restore_is_named(scene: Scene) -> None:
    """The target's kernel knows no action of seccomp, and its root may not raise limits."""
    a, b = scene.lab.a, scene.lab.b
    rules = [{"names": ["swapon"], "action": "SCMP_ACT_ERRNO"}]
    seccomp = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}
    scene.start({"linux": {"seccomp": seccomp}})
    config = a.outside(container.PYPLOOP_CONFIG)
    weak = '"prlimit", "--core=3:3", "setpriv", "--bounding-set=-sys_resource", '
    config.write_text(config.read_text().replace('agent = ["', f'agent = [{weak}"'))
    actions = "/proc/sys/kernel/seccomp/actions_avail"
    b.outside("/srv/actions").write_text("allow log\n")
    b.run("mount", "--bind", "/srv/actions", actions)
    try:
        found = refused(scene)
    finally:
        b.run("umount", actions)
    assert set(found) == {"seccomp", "limits"}
    assert "no seccomp errno" in found["seccomp"]
    assert "core (here 3, there " in found["limits"]


def test_an_immutable_file_of_a_tree_is_named_unless_the_source_keeps_it(scene: Scene) -> None:
    scene.start()
    file = scene.lab.a.outside(ROOTFS / "data/fixed")
    file.touch()
    support.run("chattr", "+i", file)
    try:
        assert "/srv/ct/rootfs/data/fixed" in refused(scene)["immutable-files"]
        scene.moves("-r", "no")
    finally:
        support.run("chattr", "-i", file)


def test_a_file_system_that_the_target_lacks_is_named_and_mmp_costs_no_wait(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, make = scene.lab, container.make_image

    def with_mmp(host: Host, guest: Path, size: int) -> None:
        make(host, guest, size)
        support.run("tune2fs", "-O", "mmp", host.outside(container.IMAGE))

    monkeypatch.setattr(container, "make_image", with_mmp)
    with container.container(lab, size=64 << 20):
        config = lab.b.outside(container.PYPLOOP_CONFIG)
        text = config.read_text()
        config.write_text(f'{text}fstype = "no-such-fs"\n')
        found = refused(scene)
        assert set(found) == {"file-system"}
        assert "no file system no-such-fs" in found["file-system"]
        config.write_text(text)
        done = migrate(lab, lab.a)
        assert done.code == 0, done.errors
        assert only_side(lab) is lab.b
        (moved,) = (e for e in done.events if e["event"] == "moved")
    assert moved["steps"]["total"] < 42, "the kernel waited for the number of MMP"
