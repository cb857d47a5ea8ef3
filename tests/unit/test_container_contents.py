# SPDX-License-Identifier: Apache-2.0
"""Who and what belongs to a runc container, on made-up /proc folders and mount
tables; tests/migrate/test_runc_contents.py has the same on real ones."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import support

from pyploop.errors import MigrateError
from pyploop.freeze.cgroup_freezer import Freezer
from pyploop.runtimes import config, copied, memory_in_use
from pyploop.runtimes.runc import cgroup, contents, host_fit, leftovers, members
from pyploop.system import descriptors, mount_table

if TYPE_CHECKING:
    from pyploop.runtimes.runc.cgroup import ContainerCgroup

# ---- processes

INIT = 100


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Its first process, a child with a child, a zombie, and others of the host."""
    made = tmp_path / "proc"
    for pid, parent, state, namespace in (
        (1, 0, "S", "host"),
        (INIT, 50, "S", "ct"),
        (50, 1, "S", "host"),
        (101, INIT, "S", "ct"),
        (102, 101, "R", "ct"),
        (103, INIT, "Z", "ct"),
        (200, 1, "S", "host"),
        (os.getpid(), 1, "R", "host"),
    ):
        process(made, pid, parent, state, namespace)
    return made


def process(proc: Path, pid: int, parent: int, state: str = "S", namespace: str = "ct") -> None:
    (proc / str(pid) / "ns").mkdir(parents=True)
    (proc / str(pid) / "stat").write_text(f"{pid} (x) (y) {state} {parent} 1 1 0 -1 4194560")
    (proc / str(pid) / "cmdline").write_bytes(f"run\0{pid}\0".encode())
    (proc / str(pid) / "ns/pid").symlink_to(f"pid:[{namespace}]")


OURS = [INIT, 101, 102, 103]


def test_a_container_of_its_first_process_alone_has_no_strangers(proc: Path) -> None:
    assert members.strangers(INIT, OURS, str(proc)) == []
    assert members.survey(INIT, OURS, str(proc)) == members.Survey([], [])


def test_processes_of_exec_are_strangers_and_so_are_their_children(proc: Path) -> None:
    process(proc, 300, 50)  # its parent is runc, outside
    process(proc, 301, 300)
    process(proc, 302, 0)  # from another namespace of processes
    process(proc, 303, 50, "Z")  # has ended: there is nothing to lose
    everybody = [*OURS, 300, 301, 302, 303]
    assert members.strangers(INIT, everybody, str(proc)) == [300, 301, 302]
    assert members.survey(INIT, everybody, str(proc)).strangers == [300, 301, 302]
    assert members.named([300, 301], str(proc)) == "300 (run 300), 301 (run 301)"


def test_one_whose_parent_has_left_the_cgroup_is_no_stranger_but_the_parent_is_outside(
    proc: Path,
) -> None:
    assert members.strangers(INIT, [INIT, 102], str(proc)) == []
    assert members.survey(INIT, [INIT, 102, 103], str(proc)).outside == [101]


def test_one_in_its_namespace_of_processes_belongs_to_its_cgroup(proc: Path) -> None:
    process(proc, 300, 200)
    assert members.strangers(INIT, OURS, str(proc)) == []
    assert members.survey(INIT, OURS, str(proc)) == members.Survey([], [300])
    assert members.survey(INIT, [*OURS, 300], str(proc)) == members.Survey([300], [])


def test_a_container_in_the_host_s_namespace_of_processes_goes_by_its_cgroup(proc: Path) -> None:
    (proc / f"{INIT}/ns/pid").unlink()
    (proc / f"{INIT}/ns/pid").symlink_to("pid:[host]")
    assert members.survey(INIT, OURS, str(proc)) == members.Survey([], [])


def test_what_one_look_of_two_finds_is_no_stranger(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process begins between the list of the cgroup and that of /proc."""
    process(proc, 104, INIT)
    real = members.survey
    monkeypatch.setattr(members, "survey", lambda init, pids: real(init, pids, str(proc)))
    lists = iter([OURS, [*OURS, 104]])
    assert members.check("ct", INIT, lambda: next(lists), drop=False) == []
    with pytest.raises(MigrateError, match="another cgroup"):
        members.check("ct", INIT, lambda: OURS, drop=False)
    process(proc, 300, 50)
    with pytest.raises(members.LostProcessError, match="300"):
        members.check("ct", INIT, lambda: [*OURS, 104, 300], drop=False)


def frozen_in_v1(tmp_path: Path, pid: int) -> contextlib.AbstractContextManager[None]:
    support.needs("root")
    top = Path("/sys/fs/cgroup/freezer")
    if not (top / "cgroup.procs").exists():
        support.missing("no freezer of cgroup v1")
    folder = top / f"pyploop-test-{os.getpid()}"

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        folder.mkdir()
        freezer = Freezer(folder, v2=False)
        try:
            (folder / "cgroup.procs").write_text(str(pid))
            freezer.knob.write_text("FROZEN")
            assert freezer.wait(time.monotonic() + 10)
            yield
        finally:
            freezer.knob.write_text("THAWED")
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            support.wait_until(lambda: not freezer.processes(), "it has ended")
            folder.rmdir()

    return inside()


@pytest.mark.parametrize("stopped", [True, False])
def test_a_stopped_process_is_known_when_it_is_frozen(tmp_path: Path, stopped: bool) -> None:
    """It looks as any frozen one then, and CRIU would wait for it for ever."""
    child = subprocess.Popen(["sleep", "60"])
    if stopped:
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    with frozen_in_v1(tmp_path, child.pid):
        assert members.stopped_or_traced(child.pid).startswith("stopped") == stopped
    child.returncode = 0


class Cgroup:
    """That of a container: notes what is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def freeze(self) -> None:
        self.asked.append("freeze")

    def thaw(self) -> None:
        self.asked.append("thaw")

    def pids(self) -> list[int]:
        return [os.getpid()]


@pytest.mark.parametrize("awaited", [0, 2, 1000])
def test_a_process_amid_a_vfork_is_let_go_on(monkeypatch: pytest.MonkeyPatch, awaited: int) -> None:
    left = iter([*[True] * awaited, False])
    monkeypatch.setattr(members, "awaits_vfork", lambda pid: next(left))
    made = Cgroup()
    if awaited < cgroup.VFORKS:
        cgroup.freeze(cast("ContainerCgroup", made), "ct")
        assert made.asked == ["freeze", "thaw"] * awaited + ["freeze"]
    else:
        with pytest.raises(MigrateError, match="vfork"):
            cgroup.freeze(cast("ContainerCgroup", made), "ct")
        assert made.asked[-1] == "thaw"


def test_what_is_stopped_after_the_checks_is_found_when_all_is_frozen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Cgroup()
    monkeypatch.setattr(members, "stopped_or_traced", lambda pid: "stopped" if made.asked else "")
    cgroup.check_none_stopped(cast("ContainerCgroup", made), "ct")
    with pytest.raises(MigrateError, match="is stopped"):
        cgroup.freeze(cast("ContainerCgroup", made), "ct")


# ---- memory


def test_memory_that_nobody_has_mapped_counts(tmp_path: Path) -> None:
    """Of a memfd, of System V's, of a tmpfs, and in swap."""
    (tmp_path / "memory.stat").write_text(
        "cache 9\nrss 1\nshmem 1\ntotal_rss 100\ntotal_shmem 2000\ntotal_swap 30\n"
    )
    assert memory_in_use.memory_of([], {"memory": str(tmp_path)}) == 2130
    (tmp_path / "memory.stat").write_text("anon 100\nfile 5000\nshmem 2000\n")
    (tmp_path / "memory.swap.current").write_text("30\n")
    assert memory_in_use.memory_of([], {"": str(tmp_path)}) == 2130
    assert memory_in_use.memory_of([], {}) == 0
    assert memory_in_use.memory_of([os.getpid()], {"": str(tmp_path)}) > 1 << 20


@contextlib.contextmanager
def a_family(how: str, size: int) -> Iterator[list[int]]:
    """Four processes that have the same memory, mapped by their parent: its pids."""
    code = (
        "import mmap, os, sys\n"
        f"m = mmap.mmap(-1, {size}, flags=mmap.MAP_ANONYMOUS | mmap.{how})\n"
        f"m.write(b'x' * {size})\n"
        "for _ in range(3):\n"
        "    if not (child := os.fork()): break\n"
        f"sum(m[n] for n in range(0, {size}, 4096))\n"
        "os.write(1, b'%d\\n' % os.getpid())\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        yield [int(first.stdout.readline()) for _ in range(4)]
        assert first.stdin is not None
        first.stdin.close()


@pytest.mark.parametrize(("how", "times"), [("MAP_SHARED", 1), ("MAP_PRIVATE", 4)])
def test_memory_that_processes_share_counts_as_often_as_a_dump_has_it(how: str, times: int) -> None:
    size = 48 << 20
    with a_family(how, size) as pids:
        found = memory_in_use.memory_of(pids, {})
        assert times * size <= found < times * size + 4 * (24 << 20)


def test_files_of_a_tmpfs_count_even_if_the_cgroup_does_not_know_them(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_text("anon 100\nshmem 2000\n")
    assert memory_in_use.memory_of([], {"": str(tmp_path)}, 5000) == 5100
    assert memory_in_use.memory_of([], {"": str(tmp_path)}, 50) == 2100


@pytest.mark.parametrize("name", ["a kB", "VmRSS: 1 kB", "x\ry kB", "RssAnon: 9 kB"])
def test_a_process_is_called_as_it_likes(name: str) -> None:
    code = "import sys; open('/proc/self/comm','w').write(sys.argv[1]); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 1 << 20 < memory_in_use.memory_of([child.pid], {}) < 1 << 30


def test_memory_that_has_grown_too_much_is_found_before_the_suspension() -> None:
    memory_in_use.check_growth("ct", 1 << 20, (1 << 30) + (8 << 20))
    memory_in_use.check_growth("ct", 0, 1 << 40)
    with pytest.raises(MigrateError, match="migrate it again") as e:
        memory_in_use.check_growth("ct", 1 << 20, (1 << 30) + (9 << 20))
    assert e.value.exit_code == 6


_HOLDS = """
import socket, sys
l = socket.create_server(("127.0.0.1", 0), backlog=200)
mine, theirs = [], []
print(l.getsockname()[1], flush=True)
for n in range(150): mine.append(l.accept()[0])
l.close(); print("on", flush=True); input()
"""


def test_more_connections_than_we_may_have_descriptors_end_without_a_packet() -> None:
    """Those that sent a FIN would stay, and keep the container from coming back."""
    support.needs("root")
    with (
        subprocess.Popen(
            [sys.executable, "-c", _HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child,
        contextlib.ExitStack() as stack,
    ):
        assert child.stdout is not None
        port = int(child.stdout.readline())
        peers = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(150)
        ]
        assert child.stdout.readline() == b"on\n"
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = max(int(n) for n in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (most + 20, hard))
        try:
            cgroup._silence(child.pid)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        child.kill()
        child.wait()
        assert not any(descriptors.readable(peer.fileno(), 0) for peer in peers)


def test_a_process_that_ends_meanwhile_is_nobody_s(proc: Path) -> None:
    assert members.strangers(INIT, [*OURS, 999], str(proc)) == []


# ---- limits and settings


def test_annotations_stay_behind_and_are_said() -> None:
    told = {"org.criu.config": "/b/criu.conf", "b": "2", "a": "1"}
    said = ["Does not move: the annotations a, b of config.json"]
    assert leftovers.annotations_of({"annotations": told}) == said
    assert leftovers.annotations_of({"annotations": {"org.criu.config": "/b/criu.conf"}}) == []
    assert leftovers.annotations_of({}) == []


@pytest.mark.parametrize(
    ("files", "resources", "said"),
    [
        ({"memory.max": "max", "pids.max": "max"}, {}, []),
        ({"memory.max": "1048576"}, {"memory": {"limit": 1050000}}, []),
        ({"memory.max": "1048576"}, {}, ["memory.max is 1048576, but config.json has no limit"]),
        ({"memory.max": "max"}, {"memory": {"limit": 4096}}, ["memory.max is max"]),
        ({"pids.max": "7"}, {"pids": {"limit": 8}}, ["pids.max is 7, but config.json has 8"]),
        ({"cpu.max": "max 100000"}, {"cpu": {"quota": -1}}, []),
        ({"cpu.max": "5000 100000"}, {"cpu": {"shares": 2}}, ["cpu.max is 5000"]),
        ({"cpuset.cpus": "0-1\n"}, {"cpu": {"cpus": "0,1"}}, []),
        ({"cpuset.cpus": "0\n"}, {"cpu": {"cpus": "0-1"}}, ["cpuset.cpus is 0"]),
        ({"cpuset.cpus": "\n"}, {}, []),
    ],
)
def test_limits_that_config_json_does_not_have_are_said(
    tmp_path: Path, files: dict[str, str], resources: dict[str, Any], said: list[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    config = {"linux": {"resources": resources}}
    found = leftovers.changed_limits(config, {"": str(tmp_path)})
    assert len(found) == len(said)
    assert all(text.startswith(start) for text, start in zip(found, said, strict=True))


def test_limits_of_a_first_version_cgroup_are_known_as_well(tmp_path: Path) -> None:
    for controller, name, text, above in (
        ("memory", "memory.limit_in_bytes", "9223372036854771712", ""),
        ("pids", "pids.max", "max", ""),
        ("cpu", "cpu.cfs_quota_us", "-1", ""),
        ("cpuset", "cpuset.cpus", "0-3", "0-3"),
    ):
        folder = tmp_path / controller / "ct"
        folder.mkdir(parents=True)
        (folder / name).write_text(text)
        (folder.parent / name).write_text(above)
    cgroups = {c: str(tmp_path / c / "ct") for c in ("memory", "pids", "cpu", "cpuset")}
    assert leftovers.changed_limits({}, cgroups) == []
    (tmp_path / "cpuset/ct/cpuset.cpus").write_text("0")
    assert [x.split()[0] for x in leftovers.changed_limits({}, cgroups)] == ["cpuset.cpus"]


def test_keys_of_the_container_s_keyring_are_said(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    line = "1cf5060f I--Q---     3 perm 3f1b0000     0     0 keyring   _ses.web: {}\n"
    file.write_text(line.format("empty"))
    assert leftovers.keys("web", str(file)) == []
    file.write_text(line.format("2"))
    assert leftovers.keys("web", str(file)) == ["2 keys of its session keyring (keyctl)"]
    assert leftovers.keys("we", str(file)) == []


# ---- mounts


def entry(
    point: str, dev: tuple[int, int], root: str = "/", fstype: str = "ext4", source: str = "/dev/x"
) -> mount_table.Entry:
    return mount_table.Entry(7, dev, root, point, fstype, source, "rw")


DISK, HOST = (7, 1), (254, 0)


@pytest.fixture
def places() -> contents.Places:
    """A disk, and a tree on the host's own file system."""
    made = contents.Places((), ())
    made.places.append(contents.Place("/ct/disk", entry("/ct/disk", DISK)))
    made.places.append(contents.Place("/ct/tree", entry("/ct", HOST, "/host/ct")))
    return made


@pytest.fixture
def outside() -> contents.Places:
    made = contents.Places((), ())
    made.places.append(contents.Place("/etc/conf", entry("/", HOST)))
    return made


CONFIG = {
    "mounts": [{"destination": "/conf", "type": "bind", "source": "/etc/conf", "options": ["bind"]}]
}


@pytest.mark.parametrize(
    ("made", "moves"),
    [
        (entry("/", DISK), True),
        (entry("/sub", DISK, "/any"), True),
        (entry("/sub", DISK, "/any//deleted"), False),
        (entry("/data", HOST, "/host/ct/tree/data"), True),
        (entry("/data", HOST, "/host/ct/tree2"), False),
        (entry("/data", HOST, "/var/lib"), False),
        (entry("/conf", HOST, "/etc/conf"), True),
        (entry("/conf", HOST, "/etc/conf//deleted"), True),
        (entry("/other", HOST, "/etc/conf"), False),
        (entry("/run", (0, 9), fstype="tmpfs"), True),
        (entry("/sys/fs/cgroup/memory", (0, 9), "/ct", fstype="cgroup"), True),
        (entry("/over", (0, 9), fstype="overlay"), False),
        (entry("/nfs", (0, 9), fstype="nfs4", source="server:/x"), False),
        (entry("/fuse", (0, 9), fstype="fuse.sshfs"), False),
        (entry("/loop", (7, 2)), False),
        (entry("/squash", (7, 3), fstype="squashfs"), False),
        (entry("/huge", (0, 9), fstype="hugetlbfs"), False),
    ],
)
def test_what_is_mounted_in_a_container_moves_or_is_named(
    places: contents.Places, outside: contents.Places, made: mount_table.Entry, moves: bool
) -> None:
    table = [entry("/", DISK), made]
    if moves:
        contents.check_mounted(table, CONFIG, places, outside)
        return
    with pytest.raises(MigrateError, match=f"{made.source}.*{made.point}") as e:
        contents.check_mounted(table, CONFIG, places, outside)
    assert e.value.exit_code == 15


def test_a_tmpfs_of_the_host_that_was_bound_into_it_is_named(
    places: contents.Places, outside: contents.Places
) -> None:
    """A restore would make a tmpfs of its own of it."""
    own, host = entry("/run", (0, 9), fstype="tmpfs"), frozenset([(0, 10)])
    contents.check_mounted([entry("/", DISK), own], CONFIG, places, outside, host)
    bound = entry("/data/shared", (0, 10), fstype="tmpfs")
    with pytest.raises(MigrateError, match=r"tmpfs.*/data/shared"):
        contents.check_mounted([entry("/", DISK), own, bound], CONFIG, places, outside, host)


def test_binds_are_sought_where_the_container_s_links_lead_and_from_the_bundle(
    tmp_path: Path,
) -> None:
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("../run")
    (tmp_path / "run").symlink_to("/other")
    (tmp_path / "loop").symlink_to("loop")
    config = {
        "mounts": [
            {"destination": "/var/run/x", "type": "bind", "source": "vol"},
            {"destination": "/a/../b//c", "type": "bind", "source": "/vol"},
            {"destination": "/proc", "type": "proc", "source": "proc"},
        ]
    }
    seen = contents.as_seen(config, "/bundle", str(tmp_path))["mounts"]
    assert [m["destination"] for m in seen] == ["/other/x", "/b/c", "/proc"]
    assert [m["source"] for m in seen] == ["/bundle/vol", "/vol", "proc"]
    assert contents.without_links(str(tmp_path), "/../..") == "/"
    contents.without_links(str(tmp_path), "/loop/x")  # has an end


def test_a_block_device_of_the_host_is_refused_unless_the_target_has_it_too(
    tmp_path: Path,
) -> None:
    support.needs("root")

    def check(device: dict[str, Any], external: Sequence[str] = ()) -> None:
        config = {"root": {"path": str(tmp_path)}, "linux": {"devices": [device]}}
        contents.check_config(config, "/b", contents.Places((), [str(tmp_path)]), external)

    disk = {"path": "/dev/data", "type": "b", "major": 7, "minor": 9}
    with pytest.raises(MigrateError, match=r"/dev/data in linux.devices.* 7:9 ") as e:
        check(disk)
    assert e.value.exit_code == 15
    check({"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200})
    node = tmp_path / "node"
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(7, 9))
    check(disk, [str(node)])
    with pytest.raises(MigrateError, match="/dev/data"):
        check({**disk, "minor": 10}, [str(node)])


def test_a_bind_with_the_option_alone_is_one() -> None:
    assert contents.is_bind({"type": "none", "options": ["rbind"]})
    assert contents.is_bind({"type": "bind"})
    assert not contents.is_bind({"type": "tmpfs", "options": ["nosuid"]})


@pytest.mark.parametrize("kind", ["nfs", "overlay", "ext4", "hugetlbfs", None])
def test_a_mount_of_config_json_with_contents_of_its_own_is_refused(
    tmp_path: Path, kind: str | None
) -> None:
    mount = {"destination": "/x", "type": kind, "source": "server:/y"}
    config = {"root": {"path": str(tmp_path)}, "mounts": [mount]}
    with pytest.raises(MigrateError, match="server:/y") as e:
        contents.check_config(config, "/b", contents.Places((), [str(tmp_path)]), ())
    assert e.value.exit_code == 15


# ---- what is removed


def test_only_the_file_that_was_copied_is_removed(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_text("old")
    known = {str(image): copied.identity(str(image))}
    image.rename(tmp_path / "aside")
    image.write_text("new")
    for what in (known, {}):
        with pytest.raises(MigrateError, match="is not what was copied"):
            copied.remove_image(str(image), what)
    assert image.read_text() == "new"
    image.unlink()
    copied.remove_image(str(image), known)  # it is gone
    (tmp_path / "aside").rename(image)
    rebooted = {path: [copied.ANY_DEVICE, *rest] for path, (_, *rest) in known.items()}
    copied.remove_image(str(image), rebooted)
    assert not image.exists()


@pytest.mark.parametrize("made", [Path.touch, Path.mkdir])
def test_a_new_file_with_the_number_of_the_copied_one_is_not_removed(
    tmp_path: Path, made: Callable[[Path], None]
) -> None:
    """A file system gives an inode's number to the next file."""
    path = tmp_path / "copied"
    made(path)
    known = {str(path): copied.identity(str(path))}
    if not known[str(path)][2]:
        pytest.skip("this file system has no generations of inodes")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for _ in range(1000):
        made(path)
        if path.stat().st_ino == known[str(path)][1]:
            break
        path.rename(tmp_path / f"other-{path.stat().st_ino}")
    else:
        pytest.skip("this file system does not use the number again at once")
    with pytest.raises(MigrateError, match="is not what was copied"):
        copied.check_same(str(path), known)
    older = {str(path): known[str(path)][:2]}
    copied.check_same(str(path), older)


def test_an_image_behind_a_link_is_removed_with_the_link(tmp_path: Path) -> None:
    image, link = tmp_path / "image", tmp_path / "link"
    image.touch()
    link.symlink_to(image)
    copied.remove_image(str(link), {str(link): copied.identity(str(link))})
    assert list(tmp_path.iterdir()) == []


# ---- the configuration


@pytest.mark.parametrize(
    ("container", "named"),
    [
        ({"external": ["etc/resolv.conf"]}, "absolute"),
        ({"external": "/etc/resolv.conf"}, "list"),
        (
            {"disk": [{"image": "/i", "mount": "/m"}, {"image": "/j", "mount": "/m/sub"}]},
            "overlap",
        ),
        ({"disk": [{"image": "/i", "mount": "/m"}, {"image": "/i", "mount": "/n"}]}, "two disks"),
    ],
)
def test_a_configuration_that_would_lose_something_is_refused(
    container: dict[str, Any], named: str
) -> None:
    with pytest.raises(MigrateError, match=named) as e:
        config.parse({"container": {"web": {"bundle": "/b", **container}}}, "x")
    assert e.value.exit_code == 1


def test_cpus_that_are_not_there_are_named() -> None:
    config = {"linux": {"resources": {"cpu": {"cpus": "0,4090-4091"}}}}
    with pytest.raises(MigrateError, match="4090, 4091"):
        host_fit.check_target(config, live=True)
    host_fit.check_target({"linux": {"resources": {"cpu": {"cpus": "0"}}}}, live=True)


@pytest.mark.parametrize("key", ["cpus", "mems"])
@pytest.mark.parametrize(
    "text", ["0-4000000000", "9" * 500, "1,0-65536", "3-99999999999,0", "-", ","]
)
def test_a_list_of_cpus_without_end_is_refused_before_it_is_made(text: str, key: str) -> None:
    """Each number of a range had a place in memory."""
    with pytest.raises(MigrateError, match=f"cpu.{key} of config.json is '.*', not a list") as e:
        host_fit.check_target({"linux": {"resources": {"cpu": {key: text}}}}, live=False)
    assert e.value.exit_code == 15
