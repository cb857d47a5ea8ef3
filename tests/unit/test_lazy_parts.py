# SPDX-License-Identifier: Apache-2.0
"""A lazy restore's parts: what is chosen, what memory can come later, the record, and what
`pyploop status` makes of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import MIB, needs, run, wait_until

import pyploop
from pyploop.errors import BusyError, MigrateError, OpenError
from pyploop.runtimes import config, lazy_images, lazy_memory, lazy_policy, lazy_record
from pyploop.runtimes.lazy_policy import Memory
from pyploop.runtimes.lazy_record import LazyRecord
from pyploop.runtimes.runc import guarded_container, lazy_guard, process_trace
from pyploop.undo import journal

BIG = Memory(private=1 << 30, forked=0, whole=1 << 20)

# ---- what is chosen


@pytest.mark.parametrize(
    ("target", "source", "chosen"),
    [
        ("auto", "auto", "auto"),
        ("auto", "never", "never"),
        ("always", "never", "always"),
        ("never", "always", "never"),
    ],
)
def test_the_targets_configuration_wins(
    target: lazy_policy.Wanted, source: lazy_policy.Wanted, chosen: str
) -> None:
    assert lazy_policy.wanted(target, source) == chosen


@pytest.mark.parametrize(
    ("want", "memory", "why"),
    [
        ("auto", BIG, ""),
        ("never", BIG, "not wanted"),
        ("auto", None, "the source does not tell"),
        ("always", None, "the source does not tell"),
        ("auto", Memory(lazy_policy.LEAST - 1, 0, 0), "it does not pay"),
        ("auto", Memory(lazy_policy.LEAST, 0, 0), ""),
        ("always", Memory(4096, 0, 0), ""),
        ("auto", Memory(1 << 30, 1 << 29, 0), "512.0 MiB of memory are shared by forked"),
        ("always", Memory(1 << 30, 1 << 29, 0), ""),
    ],
)
def test_memory_is_loaded_lazily_where_it_pays_and_can_be(
    want: lazy_policy.Wanted, memory: Memory | None, why: str
) -> None:
    chosen = lazy_policy.choose(want, memory)
    assert chosen.lazy == (not why) and chosen.why.startswith(why)


@pytest.mark.parametrize("want", ["auto", "always"])
@pytest.mark.parametrize(
    ("memory", "limit", "why"),
    [
        (Memory(1000 * MIB, 60 * MIB, 0), 0, ""),
        (Memory(1000 * MIB, 60 * MIB, 0), 1040 * MIB, ""),
        (Memory(1000 * MIB, 60 * MIB, 0), 1020 * MIB, "60.0 MiB of memory are shared"),
        (Memory(1000 * MIB, 60 * MIB, 100 * MIB), 1040 * MIB, "60.0 MiB of memory are shared"),
        (Memory(1000 * MIB, 0, 0), 1001 * MIB, ""),
    ],
)
def test_copies_for_forked_processes_must_fit_into_the_memory_limit(
    want: lazy_policy.Wanted, memory: Memory, limit: int, why: str
) -> None:
    """Or the kernel kills the container while its memory is loaded."""
    chosen = lazy_policy.choose(want, memory, limit)
    assert chosen.lazy == (not why) and chosen.why.startswith(why)


def test_a_dump_with_few_pages_is_restored_eagerly() -> None:
    assert not lazy_policy.choose_again("auto", 8 * MIB).lazy
    assert lazy_policy.choose_again("auto", lazy_policy.LEAST).lazy
    assert lazy_policy.choose_again("always", 0).lazy


def test_a_word_that_is_no_policy_is_refused() -> None:
    with pytest.raises(MigrateError, match="lazy_restore is auto, never, always"):
        config.parse({"lazy_restore": "sometimes"}, "/x")
    assert config.parse({"lazy_restore": "never"}, "/x").lazy_restore == "never"


# ---- what can come later


def test_what_cannot_come_later_is_told_with_its_size() -> None:
    program = """
import ctypes, mmap, os
private = mmap.mmap(-1, 24 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
shared = mmap.mmap(-1, 5 << 20)
fd = os.memfd_create("x")
os.ftruncate(fd, 3 << 20)
memfd = mmap.mmap(fd, 3 << 20)
for m in (private, shared, memfd):
    m.write(b"x" * len(m))
print(flush=True)
input()
"""
    p = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert p.stdin is not None and p.stdout is not None
    try:
        p.stdout.readline()
        found = lazy_memory.of_processes([p.pid], 0)
    finally:
        p.communicate(b"\n")
    assert 24 * MIB <= found.private < 64 * MIB
    assert found.shared == 8 * MIB and found.locked == 0
    assert "8.0 MiB shared memory" in lazy_memory.in_words(found.told())
    assert found.told()["whole"] == found.whole >= 8 * MIB


def smaps(*mappings: tuple[str, dict[str, int], str]) -> str:
    text = ""
    for head, sizes, flags in mappings:
        lines = [f"{name}:  {size} kB" for name, size in sizes.items()]
        text += "\n".join([f"7f00-7f01 {head}", *lines, f"VmFlags: {flags}", ""])
    return text


def test_each_kind_of_mapping_counts_where_it_belongs(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7/smaps").write_text(
        smaps(
            ("rw-p 0 00:00 0", {"Rss": 40, "Pss": 20, "Anonymous": 40, "Swap": 4}, "rd wr"),
            ("rw-p 0 00:00 0    [heap]", {"Rss": 8, "Pss": 8}, "rd wr"),
            ("rw-p 0 00:00 0", {"Rss": 16, "Pss": 16}, "rd wr lo"),
            ("rw-p 0 fe:00 9    /lib/c.so: x", {"Rss": 12, "Anonymous": 4}, "rd wr"),
            ("rw-s 0 fe:00 9    /data/base", {"Rss": 99, "Pss": 99}, "rd wr sh"),
            ("rw-s 0 00:01 9    /memfd:x (deleted)", {"Rss": 32, "Pss": 16}, "rd wr sh"),
            ("rw-p 0 00:0f 9    /anon_hugepage", {"Private_Hugetlb": 2048}, "rd ht"),
            ("r--p 0 00:00 0    [vvar]", {"Rss": 4}, "rd io pf"),
        )
    )
    found = lazy_memory.of_processes([7, 8], 0, str(tmp_path))
    kib = {name: size >> 10 for name, size in vars(found).items()}
    assert kib == {
        "private": 52, "forked": 20, "locked": 16, "huge": 2048, "files": 4, "shared": 16,
    }  # fmt: skip


# ---- the record

Made = Callable[..., LazyRecord]


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path / "state"


@pytest.fixture
def made(state_dir: Path, tmp_path: Path) -> Made:
    """A record as the guard has left it; the processes are `alive` or have ended."""

    def make(
        state: str, alive: Sequence[str] = (), images: bool = False, **fields: Any
    ) -> LazyRecord:
        path = LazyRecord.path_of(state_dir, "runc", "web")
        folder = tmp_path / "images"
        if images:
            folder.mkdir(mode=0o700)
            (folder / "x").touch()
        record = LazyRecord.create(path, runtime="runc", container="web", images=str(folder))
        me = {"pid": os.getpid(), "start": journal.start_time(os.getpid())}
        dead = {"pid": 2**22 + 1, "start": 1}
        for which in ("guard", "daemon"):
            record.fields[which] = me if which in alive else dead
        record.fields.update(state=state, **fields)
        path.write_text(json.dumps(record.fields))
        return record

    return make


@pytest.mark.parametrize(
    ("made_as", "said", "code"),
    [
        ({"state": "loading", "alive": ("guard", "daemon"), "images": True}, "loading", 2),
        ({"state": "loading", "alive": ("daemon",), "images": True}, "unguarded", 3),
        ({"state": "loading", "images": True}, "unknown", 3),
        ({"state": "complete"}, "complete", 0),
        ({"state": "lost", "images": True}, "lost", 3),
        ({"state": "prepared", "images": True}, "over", 3),
        ({"state": "loading", "boot": "another"}, "over", 0),
        ({"state": "lost", "boot": "another"}, "over", 0),
    ],
)
def test_the_status_says_what_there_is_to_do(
    made: Made, state_dir: Path, made_as: dict[str, Any], said: str, code: int
) -> None:
    made(**made_as)
    (status,) = pyploop.memory_status(state_dir=str(state_dir))
    assert (status.state, status.exit_code) == (said, code)
    command = [sys.executable, "-m", "pyploop.cli.main", "status", "--state-dir", str(state_dir)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert json.loads(done.stdout)["state"] == said
    done = subprocess.run([*command, "web"], capture_output=True, text=True, check=False)
    assert done.returncode == code and done.stdout.startswith("web: ")


def test_a_daemon_that_repeats_itself_is_reported(made: Made, state_dir: Path) -> None:
    images = made("loading", ["guard", "daemon"], images=True, read=0).images
    (images / "images").mkdir()
    entry = bytes.fromhex("0810100020062801")
    text = bytes.fromhex("1943565425400856") + len(entry).to_bytes(4, "little") + entry
    (images / "images/pagemap-7.img").write_bytes(text)  # one page
    with open("/dev/zero", "rb", buffering=0) as f:
        f.read(2 * MIB)  # as this process is the daemon
    (status,) = pyploop.memory_status(state_dir=str(state_dir))
    assert (status.state, status.total, status.left) == ("stuck", os.sysconf("SC_PAGESIZE"), 0)


def test_a_container_that_did_not_come_lazily_has_all_its_memory(state_dir: Path) -> None:
    assert pyploop.memory_status(state_dir=str(state_dir)) == ()
    (status,) = pyploop.memory_status("web", state_dir=str(state_dir))
    assert (status.state, status.left, status.exit_code) == ("complete", 0, 0)


def test_what_is_in_use_is_not_forgotten(made: Made, state_dir: Path) -> None:
    record = made("loading", ["daemon"], images=True)
    with pytest.raises(BusyError, match="still being loaded"):
        pyploop.forget_memory("web", state_dir=str(state_dir))
    assert record.path.exists() and record.images.exists()


def test_forgetting_removes_the_record_and_the_images(made: Made, state_dir: Path) -> None:
    record = made("lost", images=True)
    assert pyploop.forget_memory("web", state_dir=str(state_dir))
    assert not record.path.exists() and not record.images.exists()
    assert not pyploop.forget_memory("web", state_dir=str(state_dir))


def test_a_wait_for_memory_has_an_end(made: Made) -> None:
    record = made("loading", ["daemon"])
    began = time.monotonic()
    with pytest.raises(BusyError, match=f"process {os.getpid()}"):
        lazy_record.wait_loaded(record.path, 0.1)
    assert time.monotonic() - began >= 0.1
    made("complete")
    assert lazy_record.wait_loaded(record.path, 0.0) is not None


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "pyploop.kept/1"}'])
def test_what_is_no_record_is_said(state_dir: Path, text: str) -> None:
    path = LazyRecord.path_of(state_dir, "runc", "web")
    path.write_text(text)
    with pytest.raises(OpenError, match=r"runc-web\.lazy"):
        pyploop.memory_status(state_dir=str(state_dir))


# ---- CRIU's lists of pages


def test_lazy_pages_are_counted(tmp_path: Path) -> None:
    head = bytes.fromhex("1943565425400856")
    entries = [
        b"\x08\x01",
        b"\x08\x10\x10\x00\x20\x06\x28\x03",
        b"\x08\x20\x10\x00\x20\x04\x28\x05",
    ]
    text = head + b"".join(len(e).to_bytes(4, "little") + e for e in entries)
    for pid in (7, 8):
        (tmp_path / f"pagemap-{pid}.img").write_bytes(text)
    assert lazy_images.lazy_bytes(tmp_path) == 2 * 3 * os.sysconf("SC_PAGESIZE")
    (tmp_path / "pagemap-7.img").write_bytes(text[:-1])
    assert lazy_images.lazy_bytes(tmp_path) is None


# ---- the guard


@pytest.fixture
def cgroup(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """runc's record of a container, and its process; a folder plays the cgroup."""
    process = subprocess.Popen(["sleep", "60"])
    group = tmp_path / "cgroup"
    (group / "inner").mkdir(parents=True)
    (group / "cgroup.procs").touch()
    (group / "inner/cgroup.procs").write_text(f"{process.pid}\n")
    state = tmp_path / "state.json"
    fields = {"cgroup_paths": {"": str(group)}, "init_process_pid": process.pid}
    state.write_text(json.dumps(fields | {"init_process_start": journal.start_time(process.pid)}))
    yield state, process
    process.kill()
    process.wait()


def test_the_guard_ends_each_process_of_the_container_and_no_other(
    cgroup: tuple[Path, subprocess.Popen[bytes]],
) -> None:
    state, process = cgroup
    with subprocess.Popen(["sleep", "60"]) as other:
        assert guarded_container.end_container(str(state))
        assert process.wait(5) == -9
        assert other.poll() is None
        other.kill()


def test_the_guard_ends_nothing_where_there_is_no_container(tmp_path: Path) -> None:
    assert guarded_container.end_container(str(tmp_path / "state.json"))


def test_the_guard_leaves_the_cgroup_of_the_session(tmp_path: Path) -> None:
    (tmp_path / "systemd").mkdir()
    for hierarchy in ("", "systemd"):
        (tmp_path / hierarchy / "cgroup.procs").touch()
    lazy_guard.leave_session(str(tmp_path))
    for hierarchy in ("", "systemd"):
        assert (tmp_path / hierarchy / "cgroup.procs").read_text() == str(os.getpid())


@pytest.mark.parametrize("name", ["images", "my\timages \\ ö"])
def test_the_guard_removes_the_images_and_nothing_that_is_mounted_there(
    tmp_path: Path, name: str
) -> None:
    needs("root")
    images, outside = tmp_path / name, tmp_path / "outside"
    for folder in (images / "yard", outside):
        folder.mkdir(parents=True)
    (outside / "other").touch()
    run("mount", "--bind", outside, images / "yard")
    try:
        lazy_guard.remove(str(images))
        assert not images.exists()
        assert (outside / "other").exists()
    finally:
        run("umount", "-q", images / "yard", check=False)


def test_a_record_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_text("{}")
    record, (was, hard) = lazy_guard.Record(str(path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        with pytest.raises(OSError):
            record.set(state="loading")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (was, hard))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["{}"]


def test_the_guard_can_trace_here_or_says_why_not() -> None:
    words = f"from {process_trace.__name__} import can_trace; print(repr(can_trace()))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", words], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "''"


def test_a_guard_whose_agent_ends_before_the_container_runs_leaves_nothing(
    made: Made,
) -> None:
    record = made("prepared")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, "-I", "-m", lazy_guard.__name__, str(theirs.fileno())]
    with subprocess.Popen([*words, str(record.path)], pass_fds=[theirs.fileno()]) as guard:
        theirs.close()
        assert json.loads(ours.recv(1000)) == {"ready": ""}
        known = LazyRecord.read(record.path)
        assert known is not None and known.process("guard") == guard.pid
        ours.close()
        assert guard.wait(10) == 0
    wait_until(lambda: not record.path.exists(), "the record is removed")


DAEMON = """
import os, socket, sys, time
listening = socket.socket(socket.AF_UNIX)
os.chdir(sys.argv[1])
listening.bind("lazy-pages.socket")
os.write(int(sys.argv[-1]), b"x")
time.sleep(60)
"""
"""Listens as CRIU's does."""


@pytest.mark.parametrize("same", [True, False])
def test_the_guard_ends_the_container_that_it_guards_and_not_one_that_was_started_anew(
    made: Made, tmp_path: Path, cgroup: tuple[Path, subprocess.Popen[bytes]], same: bool
) -> None:
    if why := process_trace.can_trace():
        pytest.skip(why)
    state, process = cgroup
    record = made("prepared")
    work = tmp_path / "work"
    work.mkdir()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, "-I", "-m", lazy_guard.__name__, str(theirs.fileno())]
    order: dict[str, Any] = {"op": "serve", "argv": [sys.executable, "-c", DAEMON, str(work)]}
    order |= {"log": str(work / "log"), "state": str(state), "images": str(work)}
    with subprocess.Popen([*words, str(record.path)], pass_fds=[theirs.fileno()]) as guard, ours:
        theirs.close()
        ours.recv(1000)
        ours.send(json.dumps(order | {"commit": str(work / "commit")}).encode())
        assert json.loads(ours.recv(1000)) == {"serving": ""}
        ours.send(b'{"op": "keep"}')
        wait_until(lambda: state_of(record) == "loading", "the guard has heard it")
        if not same:
            fields = json.loads(state.read_text())
            state.write_text(json.dumps(fields | {"init_process_start": 1}))
        known = LazyRecord.read(record.path)
        assert known is not None
        os.kill(known.process("daemon"), signal.SIGKILL)
        assert guard.wait(30) == 0
    assert (process.poll() is None) == (not same)
    assert state_of(record) == ("lost" if same else "complete")
    assert work.exists() == same


def state_of(record: LazyRecord) -> str:
    now = LazyRecord.read(record.path)
    return now.state if now else ""
