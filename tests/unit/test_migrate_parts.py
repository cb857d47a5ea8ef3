# SPDX-License-Identifier: Apache-2.0
"""Parts of a migration that need no second host: configuration, verdict, files
in a channel, the bundle that is fitted, jobs."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyploop.errors import (
    BusyError,
    Interrupted,
    MigrateError,
    ProtocolError,
    PyploopError,
    ReadError,
)
from pyploop.migration import commit_record, file_stream, undo_kinds
from pyploop.runtimes import config
from pyploop.system.commands import Command
from pyploop.system.jobs import Job, in_parallel
from pyploop.transport import hints

# ---- messages


@pytest.mark.parametrize("hint", ["wait for it. Then try again", None])
def test_a_hint_of_the_agent_is_a_hint_at_the_source(hint: str | None) -> None:
    error = BusyError("it is locked", hint=hint)
    assert hints.parted(error.with_hint()) == ("it is locked", hint)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"kind": "rmdir", "path": "/a/b"}, "removing the folder /a/b"),
        ({"kind": "resume", "container": "box", "runtime": "runc"}, "resuming container box"),
        ({"kind": "unmount"}, "unmount"),  # an older journal's, without its fields
        ({"kind": "new", "what": "a new step"}, "a new step"),
    ],
)
def test_an_undo_step_is_described_by_what_it_undoes(entry: dict[str, str], text: str) -> None:
    assert undo_kinds.described(entry) == text


# ---- configuration

GOOD: dict[str, Any] = {
    "state_dir": "/s",
    "remote": {"ssh": ["ssh", "-4"]},
    "container": {
        "web": {"bundle": "/b", "disk": [{"image": "/i", "mount": "/m"}], "stop_timeout": 3}
    },
}


def trees(*paths: str, disk: tuple[str, str] | None = None) -> dict[str, Any]:
    """The container, with these trees, and a disk (image, where it is mounted)."""
    disks = [] if disk is None else [{"image": disk[0], "mount": disk[1]}]
    return {
        "container": {
            "web": {"bundle": "/b", "disk": disks, "tree": [{"path": path} for path in paths]}
        }
    }


def disk(image: str, mount: str) -> dict[str, str]:
    return {"image": image, "mount": mount}


NESTED: list[tuple[dict[str, Any], str]] = [
    (
        {"bundle": "/b", "disk": [disk("/i", "/m"), disk("/j", "/m/x")]},
        "mounted on /m and /m/x overlap",
    ),
    (
        {"bundle": "/b", "disk": [disk("/i", "/m"), disk("/j", "/m/../m//x")]},
        "mounted on /m and /m/../m//x overlap",
    ),
    (
        {"bundle": "/b", "disk": [disk("/i", "/m"), disk("/j", "/m")]},
        "mounted on /m and /m overlap",
    ),
    ({"bundle": "/b", "disk": [disk("/i", "/m"), disk("/m/j", "/n")]}, "the disk /m/j"),
    ({"bundle": "/m/b", "disk": [disk("/i", "/m")]}, "the bundle /m/b"),
    ({"bundle": "/m", "disk": [disk("/i", "/m")]}, "the bundle /m"),
]
"""Where the source decides what lies at a path of the configuration."""


def test_a_tree_beside_a_disk_and_in_the_bundle_is_taken() -> None:
    web = config.parse(trees("/b/rootfs", "/b2", disk=("/b/i", "/b/root")), "x").container("web")
    assert web.trees == ("/b/rootfs", "/b2")


def test_a_configuration_is_read_with_its_defaults() -> None:
    host = config.parse(GOOD, "x.toml")
    assert (host.state_dir, host.ssh, host.agent) == ("/s", ("ssh", "-4"), ("pyploop", "agent"))
    web = host.container("web")
    assert (web.runtime, web.stop_timeout, web.disks[0].fstype) == ("runc", 3.0, "ext4")
    with pytest.raises(MigrateError, match=r"no \[container\.other\]") as e:
        host.container("other")
    assert e.value.exit_code == 10


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stat_dir": "/x"}, "stat_dir"),
        ({"migrations": "2"}, "migrations"),
        ({"migrations": True}, "migrations"),
        ({"remote": {"ssh": "ssh -4"}}, "list of non-empty strings"),
        ({"remote": {"port": 22}}, "port"),
        ({"container": {"../web": {}}}, "a container's name has"),
        ({"container": {"web": {"image": "/i"}}}, "image"),
        ({"container": {"web": {"disk": {"image": "i", "mount": "/m"}}}}, "absolute"),
        ({"container": {"web": {"disk": {"mount": "/m"}}}}, "image"),
        ({"container": {"web": {"commands": {"run": ["x"]}}}}, "run"),
        ({"container": {"web": {"link_up": []}}}, "link_up"),
        *(
            ({"container": {"web": {"tree": {"path": path}}}}, "absolute path below /")
            for path in ("/", "t", "/t/", "/t/../u", "/t/./u", "/t\\", "/%t", "/t\n", "//t")
        ),
        (trees("/t", "/t/u"), "/t and /t/u overlap"),
        (trees("/b"), "bundle /b lies in"),
        (trees("/b/rootfs", disk=("/b/rootfs/i", "/m")), "disk /b/rootfs/i lies in"),
        (trees("/t", disk=("/i", "/t/m")), "/t/m and the tree /t overlap"),
        (trees("/m//t", disk=("/i", "/m")), "absolute path below /"),
        (trees("/m/t", disk=("/i", "//m/")), "overlap"),
        *(({"container": {"web": web}}, named) for web, named in NESTED),
        ({"state_dir": "/m/state"}, "state_dir is /m/state, inside /m"),
        ({"images_dir": "/m"}, "images_dir is /m, inside /m"),
        (
            {"container": {**GOOD["container"], "db": {"bundle": "/m/db", "tree": {"path": "/t"}}}},
            "bundle /m/db of the container db lies in /m",
        ),
        ({"trust": {"dead": []}}, "dead"),
        ({"trust": {"live": "a"}}, "list of non-empty strings"),
        ({"trust": {"live": ["10.0.0.0/33"]}}, "is not a network"),
        ({"policy": {"capability": []}}, "capability"),
        ({"policy": {"capabilities": ["SYS_ADMIN"]}}, "SYS_ADMIN"),
        ({"policy": {"private": 1}}, "private must be true or false"),
        ({"policy": {"seccomp": "yes"}}, "optional, required"),
        ({"policy": {"namespaces": ["pid"]}}, "must have mount, ipc, uts"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(MigrateError, match=named) as e:
        config.parse({**GOOD, **change}, "x.toml")
    assert e.value.exit_code == 1


# ---- the verdict


def test_a_verdict_is_asked_only_when_its_owner_has_ended(tmp_path: Path) -> None:
    name = commit_record.new_id()
    own = commit_record.CommitRecord.create(tmp_path, name)
    own.write(commit_record.COMMITTED)
    # A command of the owner's that lives on, as a restore may.
    child = subprocess.Popen(["sleep", "60"], pass_fds=[own.fd])
    own.close()
    try:
        with pytest.raises(BusyError), commit_record.locked(tmp_path, name, 0.1):
            pass
    finally:
        child.kill()
        child.wait()
    with commit_record.locked(tmp_path, name, 5) as record:
        assert record is not None
        assert record.read() == commit_record.COMMITTED
    with commit_record.locked(tmp_path, commit_record.new_id(), 0) as record:
        assert record is None


@pytest.mark.parametrize("bad", ["", "../etc/passwd", "0" * 17, "G" * 16, None, 7, "0" * 15 + "\n"])
def test_what_is_no_migration_never_becomes_a_file_name(bad: object) -> None:
    with pytest.raises(ProtocolError):
        commit_record.check_id(bad)


# ---- files in a channel


@pytest.fixture
def channel() -> Iterator[tuple[int, int]]:
    a, b = socket.socketpair()
    yield a.detach(), b.detach()


def receive(fd: int, folder: Path) -> Job[file_stream.Received]:
    def create(name: str) -> int:
        return os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    return Job(lambda: file_stream.receive(fd, 10, file_stream.Place(create, durable=True))).start()


def test_files_arrive_with_their_holes_sizes_and_modes(
    channel: tuple[int, int], tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    with source.open("wb") as f:
        f.write(b"head")
        f.truncate(8 << 20)
        f.seek(5 << 20)
        f.write(os.urandom(700_000))
    source.chmod(0o751)
    (tmp_path / "empty").touch()
    job = receive(channel[1], target)
    with file_stream.Writer(channel[0], 10) as out:
        out.file("one", str(source))
        out.file("two", str(tmp_path / "empty"))
        out.end()
    assert job.join(20).names == ["one", "two"]
    assert (target / "one").read_bytes() == source.read_bytes()
    assert (target / "one").stat().st_mode & 0o777 == 0o751
    assert (target / "one").stat().st_blocks * 512 < 2 << 20
    assert (target / "two").stat().st_size == 0


def test_a_limited_writer_takes_its_time(channel: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(1 << 20))
    (tmp_path / "target").mkdir()
    job = receive(channel[1], tmp_path / "target")
    with file_stream.Writer(channel[0], 10, rate=4 << 20) as out:
        start = time.monotonic()
        out.file("one", str(tmp_path / "source"))
        out.end()
    assert time.monotonic() - start >= 0.2
    assert job.join(20).names == ["one"]


def head(name: int, length: int, pos: int) -> bytes:
    return struct.pack("<HHIQ", name, 0o600, length, pos)


@pytest.mark.parametrize(
    "stream",
    [
        head(1025, 0, 0),
        head(1, (1 << 20) + 1, 0),
        head(1, 1, 1 << 62),
        head(1, 0, 5) + b"a" + head(1, 1, 0) + b"ax" + head(0, 0, 0),
        head(1, 1, 0) + b"ax" + head(0, 0, 0),
        head(1, 1, 0) + b"a",
    ],
)
def test_pieces_that_may_not_come_are_refused(
    channel: tuple[int, int], tmp_path: Path, stream: bytes
) -> None:
    job = receive(channel[1], tmp_path)
    with socket.socket(fileno=channel[0]) as s:
        s.sendall(stream)
    with pytest.raises(PyploopError):
        job.join(10)


# ---- jobs


def test_the_first_failure_cancels_the_others_and_goes_on() -> None:
    cancelled = threading.Event()

    def waits() -> None:
        assert cancelled.wait(10)
        raise ReadError("cancelled")

    def fails() -> None:
        raise MigrateError(6, "the cause")

    with pytest.raises(MigrateError, match="the cause"):
        in_parallel([waits, fails], cancelled.set)
    assert in_parallel([lambda: 1, lambda: 2], cancelled.set) == [1, 2]


def test_a_command_whose_wait_is_interrupted_has_ended_before_anything_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted(signum)

    go, done = tmp_path / "go", tmp_path / "done"
    script = f"until [ -e {go} ]; do sleep 0.01; done; kill -USR1 {os.getpid()}"
    wait = Command._end

    def waits(command: Command, timeout: float) -> None:
        go.mkdir()  # no descriptor that the signal may leave open
        wait(command, timeout)

    monkeypatch.setattr(Command, "_end", waits)
    old = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(Interrupted):
            Command(["sh", "-c", f"{script}; sleep 0.2; : >{done}"]).wait(20)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert done.exists()
