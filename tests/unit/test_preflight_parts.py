# SPDX-License-Identifier: Apache-2.0
"""Parts of the checks before a live migration that need no container: what the kernel of the
target has, CRIU's options, and why runc and CRIU have failed."""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import subprocess
import sys
from contextlib import nullcontext as nothing
from dataclasses import replace
from pathlib import Path

import pytest
from support import needs, run

from pyploop.disks import ext4_mmp
from pyploop.errors import MigrateError, VzExitCode
from pyploop.migration.source.checks import _check_mmp
from pyploop.report.timeline import Recorder, chrome_trace
from pyploop.runtimes import Disk
from pyploop.runtimes.runc import (
    contents,
    criu,
    criu_options,
    limits,
    preflight_kernel,
    preflight_sockets,
    private_images,
)
from pyploop.runtimes.runc.preflight import CriuOptions
from pyploop.runtimes.runc.preflight_files import deleted, descriptors, special
from pyploop.system import file_systems

# ---- the kernel of the target

_PROFILES = "docker-default (enforce)\n/usr/sbin/cupsd (complain)\nlsb_release (enforce)\n"
_ACTIONS = "kill_process kill_thread trap errno trace log allow\n"


def test_a_profile_that_the_target_has_not_loaded_is_named(tmp_path: Path) -> None:
    profiles = tmp_path / "profiles"
    profiles.write_text(_PROFILES)
    preflight_kernel.check_labels(["docker-default", "docker-default//&lsb_release"], str(profiles))
    with pytest.raises(MigrateError, match="has not loaded the AppArmor profile web") as e:
        preflight_kernel.check_labels(["docker-default", "web"], str(profiles))
    assert e.value.exit_code == VzExitCode.NO_KERNEL
    with pytest.raises(MigrateError, match="has no AppArmor for"):
        preflight_kernel.check_labels(["web"], str(tmp_path / "none"))
    preflight_kernel.check_labels([], str(tmp_path / "none"))


def test_the_profiles_of_processes_are_read_as_the_kernel_shows_them(tmp_path: Path) -> None:
    for pid, label in ((1, "docker-default (enforce)\n"), (2, "unconfined\n"), (3, "a (complain)")):
        (tmp_path / str(pid) / "attr").mkdir(parents=True)
        (tmp_path / str(pid) / "attr/current").write_text(label)
    assert preflight_kernel.labels([1, 2, 3, 4], str(tmp_path)) == ["a", "docker-default"]


def test_an_action_of_seccomp_that_the_target_s_kernel_lacks_is_named(tmp_path: Path) -> None:
    actions = tmp_path / "actions_avail"
    actions.write_text(_ACTIONS)
    rules = [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]
    config = {"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}}}
    with pytest.raises(MigrateError, match="no seccomp user_notif"):
        preflight_kernel.check_seccomp(config, True, str(actions))
    preflight_kernel.check_seccomp(config, False, str(actions))
    preflight_kernel.check_seccomp({}, True, str(actions))
    with pytest.raises(MigrateError, match="no seccomp filters"):
        preflight_kernel.check_seccomp({}, True, str(tmp_path / "none"))


def test_root_without_the_capability_may_not_read_the_limits_of_others() -> None:
    needs("root", "setpriv")
    code = "from pyploop.runtimes.runc import limits; limits.check_readable([{pid}])"
    words = ["setpriv", "--bounding-set=-sys_resource", sys.executable, "-c"]
    other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat"]
    for command, refused in ((other, True), (["cat"], False)):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(b"x")
            process.stdin.flush()
            process.stdout.read(1)  # it is the other user's now
            done = subprocess.run(
                [*words, code.format(pid=process.pid)], capture_output=True, text=True, check=False
            )
            assert ("may not read the limits of process" in done.stderr) is refused, done.stderr
            process.stdin.close()


def test_higher_limits_than_root_may_set_are_named() -> None:
    found = limits.highest([os.getpid()])
    assert set(found) == set(limits.NAMES.values())
    limits.check(found, may_raise=False)
    core = resource.getrlimit(resource.RLIMIT_CORE)[1]
    with pytest.raises(MigrateError, match="would lower limits") if core != -1 else nothing():
        limits.check({"CORE": -1}, may_raise=False)
    limits.check({"CORE": -1, "NOFILE": 1 << 40}, may_raise=True)
    with pytest.raises(MigrateError, match=f"nofile .*there {1 << 40}"):
        limits.check({"NOFILE": 1 << 40}, may_raise=False)


def test_a_socket_of_a_protocol_that_criu_does_not_know_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SCTP's, as a kernel with it shows it; that of this machine may have none."""

    class Sctp:
        family, type, proto = socket.AF_INET, socket.SOCK_STREAM, 132

        def __enter__(self) -> Sctp:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(preflight_sockets, "_taken", lambda _one: Sctp())
    own = os.stat("/proc/self/ns/net").st_ino
    monkeypatch.setattr(preflight_sockets, "_network_of", lambda _copy: own)
    with socket.socket() as ours:
        files = [f for f in descriptors([os.getpid()]) if f.number == ours.fileno()]
        (problem,) = preflight_sockets.of(files, [os.getpid()], False, False)
    assert problem.check == "socket-protocol"
    assert "of the protocol 132" in problem.what


def test_runc_s_controllers_stand_for_v2_only_without_those_of_v1() -> None:
    assert preflight_kernel.controllers({"": "/a", "pids": "/b", "cpu": "/c"}) == ["cpu", "pids"]
    assert preflight_kernel.controllers({"": "/a"}) == [""]


def test_a_file_system_is_there_in_the_kernel_or_in_a_module(tmp_path: Path) -> None:
    table = tmp_path / "filesystems"
    table.write_text("nodev\tproc\n\text4\n")
    assert file_systems.has("ext4", table)
    assert file_systems.has("proc", table)
    assert not file_systems.has("no-such-fs", table)


@pytest.mark.parametrize(("options", "seconds"), [("mmp", 44 - 2), ("^mmp", 0)])
def test_the_wait_for_a_copy_with_mmp_is_known(tmp_path: Path, options: str, seconds: int) -> None:
    """Mounting one took 44.5 s here: twice 21 s, and some."""
    needs("mkfs.ext4")
    image = tmp_path / "image"
    with image.open("wb") as f:
        f.truncate(16 << 20)
    assert ext4_mmp.seconds(str(image)) == 0
    run("mkfs.ext4", "-q", "-F", "-O", options, image)
    assert ext4_mmp.seconds(str(image)) == seconds
    if seconds:
        data = bytearray(image.read_bytes())
        struct.pack_into("<H", data, 1024 + 0x166, 300)
        image.write_bytes(data)
        assert ext4_mmp.seconds(str(image)) == 2 * 360


@pytest.mark.parametrize(
    "features", ["mmp", "mmp,^metadata_csum", "mmp,metadata_csum_seed", "mmp,bigalloc"]
)
def test_e2fsck_accepts_a_copy_whose_mmp_is_cleared(tmp_path: Path, features: str) -> None:
    needs("mkfs.ext4")
    image = tmp_path / "image"
    with image.open("wb") as f:
        f.truncate(16 << 20)
    run("mkfs.ext4", "-q", "-F", "-O", features, image)
    clean = image.read_bytes()
    at = struct.unpack_from("<Q", clean, 1024 + 0x168)[0] * _block_size(clean)
    data = bytearray(clean)
    struct.pack_into("<I", data, at + 4, 7)  # as if it were mounted; its checksum is wrong, too
    image.write_bytes(data)
    with image.open("r+b") as f:
        ext4_mmp.clear(f.fileno())
    assert image.read_bytes() == clean
    run("e2fsck", "-f", "-n", image)


def _block_size(image: bytes) -> int:
    return 1024 << int(struct.unpack_from("<I", image, 1024 + 0x18)[0])


def test_a_target_that_would_wait_for_mmp_is_refused(tmp_path: Path) -> None:
    """Its agent is older, or the runtime mounts the disk."""
    needs("mkfs.ext4")
    image = tmp_path / "image"
    with image.open("wb") as f:
        f.truncate(16 << 20)
    run("mkfs.ext4", "-q", "-F", "-O", "mmp", image)
    new, old = frozenset({"tree", "mmp"}), frozenset({"tree"})
    disk = Disk(str(image), "/mnt", "ext4", "", str(image))
    _check_mmp([disk], new, "0.2.0 on b")
    for one, takes in ((disk, old), (replace(disk, mount=""), new)):
        with pytest.raises(MigrateError, match=r"would wait for 42 s .* pyploop 0.2.0 on b"):
            _check_mmp([one], takes, "0.2.0 on b")


@pytest.mark.parametrize("offset", [0x18, 0x168, 0x38])
def test_what_is_no_mmp_block_is_not_written(tmp_path: Path, offset: int) -> None:
    """Of a hostile source: the size of a block, the block's number; no ext4 at all."""
    needs("mkfs.ext4")
    image = tmp_path / "image"
    with image.open("wb") as f:
        f.truncate(16 << 20)
    run("mkfs.ext4", "-q", "-F", "-O", "mmp", image)
    for value in (0, 5, 0xFFFFFFFF):
        data = bytearray(image.read_bytes())
        struct.pack_into("<I", data, 1024 + offset, value)
        image.write_bytes(data)
        with image.open("r+b") as f:
            ext4_mmp.clear(f.fileno())
        assert image.read_bytes() == data


# ---- CRIU's options


def test_criu_s_options_are_read_as_criu_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "criu.conf"
    file.write_text("# mine\nnetwork-lock skip\nghost-limit=8M # larger\n--ext-unix-sk\n")
    assert criu_options.of_dump(str(file), [], []) == CriuOptions(8 << 20, True, str(file))
    assert criu_options.of_dump("", ["--ext-unix-sk"], ["ghost-limit 1G"]).ghost_limit == 1 << 30
    assert criu_options.of_dump("", [], []) == CriuOptions()


def test_only_harmless_options_of_a_source_are_taken_and_the_target_s_own_win() -> None:
    theirs = ["ghost-limit 8M", "action-script /bin/evil", "ext-unix-sk", "ghost-limit 1 2"]
    assert criu_options.merged(theirs[:3], []) == ["ghost-limit 8M", "ext-unix-sk"]
    assert criu_options.merged(theirs[3:], ["log-level 4"]) == ["log-level 4"]
    assert criu_options.merged(["ghost-limit 8M"], ["ghost-limit 2M"]) == ["ghost-limit 2M"]
    assert criu_options.merged(None, []) == []


def test_a_file_of_ours_gets_the_options_that_it_lacks(tmp_path: Path) -> None:
    file = tmp_path / "criu.conf"
    criu_options.complete(str(file), ["ghost-limit 2M"])
    assert not file.exists()
    file.write_text("network-lock skip\nghost-limit 8M\n")
    criu_options.complete(str(file), ["ghost-limit 2M", "log-level 4"])
    assert file.read_text() == "network-lock skip\nghost-limit 8M\nlog-level 4\n"


def test_told_options_are_those_that_move() -> None:
    assert criu_options.told("", ["ghost-limit 2M", "log-level 4"]) == ["ghost-limit 2M"]


# ---- files of a process


def test_files_of_this_process_are_found_as_proc_shows_them(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as kept:
        kept.write(bytes(8192))
        kept.flush()
        os.fsync(kept.fileno())
        file.unlink()
        files = [f for f in descriptors([os.getpid()]) if f.number == kept.fileno()]
        (found,) = deleted(files, [], 4096)
        assert (found.check, found.path) == ("deleted-file-size", str(file))
        assert not [*deleted(files, [], 1 << 20)]
        assert not [*special(files, [], "criu")]


def test_only_the_group_of_the_container_s_root_may_read_its_images(tmp_path: Path) -> None:
    for folder in ("images", "1", "restore-work"):
        (tmp_path / folder).mkdir(0o700)
        (tmp_path / folder / "core-1.img").touch(0o600)
    config = {"linux": {"gidMappings": [{"containerID": 0, "hostID": os.getgid(), "size": 9}]}}
    private_images.let_read(tmp_path, private_images.group_of(config))
    modes = {
        str(p.relative_to(tmp_path)): f"{p.stat().st_mode & 0o777:o}" for p in tmp_path.rglob("*")
    }
    assert modes == {
        **{"images": "750", "images/core-1.img": "640", "1": "750", "1/core-1.img": "640"},
        **{"restore-work": "700", "restore-work/core-1.img": "600"},
    }
    assert private_images.group_of({}) is None


def test_a_dead_link_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(MigrateError, match="it is a dead link to nowhere"):
        contents.check_external([str(tmp_path / "link")], [[0]])


# ---- why it failed

_CRIU_LOG = """\
(00.000045) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: not permitted
(00.010000) Warn  (criu/kerndat.c:1): no matter
(00.021000) Error (criu/sk-netlink.c:77): netlink: The socket has data to read
(00.022000)      1: Error (criu/files.c:1221): Unable to open fd=3
"""
_RUNC_LOG = """\
time="2026-11-30T22:32:30Z" level=warning msg="no matter"
time="2026-11-30T22:32:35Z" level=error msg="failed to write \\"2714\\": no such file"
"""


def test_criu_s_errors_are_whole_and_without_the_harmless_one(tmp_path: Path) -> None:
    log, runc = tmp_path / "dump.log", tmp_path / "runc.log"
    log.write_text(_CRIU_LOG)
    assert criu.why_failed(log, runc, "") == (
        "Error (criu/sk-netlink.c:77): netlink: The socket has data to read; "
        "1: Error (criu/files.c:1221): Unable to open fd=3"
    )
    first = "(00.1) Error (criu/first.c:1): the cause\n"
    log.write_text(first + "(00.2) Error (criu/then.c:2): what followed\n" * 500)
    assert criu.errors_of(log).startswith("Error (criu/first.c:1): the cause; ")
    assert len(criu.errors_of(log)) < 2100


def test_runc_s_own_errors_are_quoted_when_criu_has_none(tmp_path: Path) -> None:
    log, runc = tmp_path / "restore.log", tmp_path / "runc.log"
    assert criu.why_failed(log, runc, "") == "it printed nothing"
    log.write_text(_CRIU_LOG.splitlines()[0])
    runc.write_text(_RUNC_LOG)
    assert criu.why_failed(log, runc, "x") == 'failed to write "2714": no such file'


def test_a_step_that_ended_before_its_span_is_a_moment_in_the_trace() -> None:
    recorder = Recorder()
    recorder.add("restore", 10.0, 12.0)
    recorder.add("disk 0 ended", 10.0, 9.5, "target")
    events = json.loads(chrome_trace(recorder))["traceEvents"]
    spans = {e["name"]: (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert spans == {"restore": (500000.0, 2000000.0), "disk 0 ended": (0.0, 0.0)}
