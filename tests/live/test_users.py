# SPDX-License-Identifier: Apache-2.0
"""Who else uses the bytes of a source: frozen together, noticed, or refused before
the first byte; never a copy with exit 0 that lacks what they wrote."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stepper
from support import MIB, loop_device, mounted, needs, partition, pyploop_cmd, run, wait_until
from support_live import Copied, Copy, comparison, copy, same, sparse_file, succeeded, work_dir

pytestmark = pytest.mark.root

SIZE = 24 * MIB
DATA = 12 * MIB
"""Bytes of random data in an image; a position in it, too."""


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop", "mkfs.ext4")
    with work_dir() as path:
        yield path


def image(folder: Path, name: str = "image") -> Path:
    """An ext4 with a file of random data."""
    path = sparse_file(folder / name, SIZE)
    content = folder / "content"
    content.mkdir()
    (content / "data").write_bytes(os.urandom(DATA))
    quiet = ["-E", "lazy_itable_init=0,lazy_journal_init=0"]
    run("mkfs.ext4", "-q", "-F", *quiet, "-d", content, path)
    return path


def slowly(source: str, target: Path, act: Callable[[], object], *options: str) -> Copied:
    """A copy, and something that is done when its first pass has read everything: the
    copy stands still until that has ended."""
    steps = target.with_name(target.name + ".steps")
    steps.mkdir()
    sender = [sys.executable, stepper.__file__, "first pass sent", str(steps), "copy"]
    with Copy(source, target, *options, via="local", sender=sender) as running:
        wait_until(
            lambda: (steps / "at").exists() or running.sender.poll() is not None, "the first pass"
        )
        act()
        (steps / "go").touch()
        return running.wait()


def in_phase(got: Copied, name: str) -> bool:
    return any(e["event"] == "phase" and e["phase"] == name for e in got.events)


def refused(source: str, target: Path, *words: str, **how: Any) -> None:
    """Before the first byte, with these words."""
    done = copy(source, target, via="local", **how)
    assert done.code == 4, done.errors
    assert not target.exists()
    assert "Traceback" not in done.errors and "First pass" not in done.errors
    for word in (*words, "--unsafe-in-use"):
        assert word in done.errors


# ---- other ways to the same bytes


def test_a_second_loop_device_that_is_mounted_is_named(folder: Path) -> None:
    disk = image(folder)
    os.link(disk, folder / "link")
    with (
        loop_device(disk) as source,
        loop_device(folder / "link") as other,
        mounted(other, folder / "m") as point,
    ):
        refused(source, folder / "copy", other, str(point), "copy " + other)
        # And that one can be copied, the idle one beside it.
        (point / "f").write_bytes(b"x" * MIB)
        check = comparison(disk, folder / "copy", SIZE)
        succeeded(copy(other, folder / "copy", "--before-thaw", check, via="local"))


def test_a_mounted_loop_device_of_the_whole_disk_is_named_for_a_part_of_it(folder: Path) -> None:
    disk = image(folder)
    with (
        loop_device(disk) as whole,
        loop_device(disk, offset=4 * MIB) as part,
        mounted(whole, folder / "m"),
    ):
        refused(part, folder / "copy", whole, str(folder / "m"))


def test_a_renamed_file_is_the_same_file(folder: Path) -> None:
    disk = image(folder)
    with loop_device(disk) as source:
        disk.rename(folder / "renamed")
        with loop_device(folder / "renamed") as other, mounted(other, folder / "m"):
            refused(source, folder / "copy", other)


def test_a_file_below_an_overlay_is_the_same_file(folder: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (folder / name).mkdir()
    disk = image(folder / "upper")
    options = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
    with (
        mounted("overlay", folder / "merged", options, "overlay") as merged,
        loop_device(merged / disk.name) as source,
        loop_device(disk) as other,
        mounted(other, folder / "m"),
    ):
        refused(source, folder / "copy", other)


def test_a_neighbour_that_grows_over_the_source_during_the_copy_is_a_user(folder: Path) -> None:
    disk = sparse_file(folder / "image", 8 * MIB)
    with loop_device(disk) as neighbour:
        disk.write_bytes(os.urandom(SIZE))
        with loop_device(disk, offset=8 * MIB) as source:

            def act() -> None:
                run("losetup", "--set-capacity", neighbour)
                by_dd(neighbour, 8 * MIB)  # where the first pass has been

            succeeded(slowly(source, folder / "copy", act))
            assert same(disk, folder / "copy", SIZE - 8 * MIB, offset=8 * MIB)


@pytest.mark.parametrize("kind", ["loop device", "partition"])
def test_neighbours_that_share_no_byte_are_no_users(folder: Path, kind: str) -> None:
    disk = sparse_file(folder / "image", 2 * SIZE)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(loop_device(disk, offset=SIZE))
        if kind == "partition":
            whole = stack.enter_context(loop_device(disk))
            neighbour = stack.enter_context(partition(whole, 1, 0, SIZE))
        else:
            options = ["--sizelimit", str(SIZE)]
            neighbour = stack.enter_context(loop_device(disk, options=options))
        for device, point in ((source, folder / "m"), (neighbour, folder / "n")):
            run("mkfs.ext4", "-q", "-F", device)
            stack.enter_context(mounted(device, point))
        (folder / "m/f").write_bytes(os.urandom(8 * MIB))
        write = partial((folder / "n/f").write_bytes, os.urandom(MIB))
        check = comparison(disk, folder / "copy", SIZE, offset=SIZE)
        got = slowly(source, folder / "copy", write, "--before-thaw", check)
        succeeded(got)
        assert not got.repairs


def test_one_that_is_only_read_is_no_user(folder: Path) -> None:
    disk = image(folder)
    with (
        loop_device(disk) as source,
        loop_device(disk, options=["--read-only"]) as other,
        mounted(other, folder / "m", "ro"),
        disk.open("rb"),
    ):
        succeeded(copy(source, folder / "copy", via="local"))
    assert same(disk, folder / "copy", SIZE)


def _mapped(disk: Path) -> None:
    code = (
        "import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(f, 0); "
        f"os.close(f); m[{DATA}:{DATA + 5}] = b'hello'"
    )
    run(sys.executable, "-c", code, disk)


def _submitted(disk: Path) -> None:
    needs("qemu-io")
    run("qemu-io", "-t", "none", "-n", "-f", "raw", "-c", f"write -P 7 {DATA} 64k", disk)


SUBMIT = """
import ctypes, ctypes.util, mmap, os, struct, sys
aio = ctypes.CDLL(ctypes.util.find_library("aio"))
data = mmap.mmap(-1, 1 << 20)
data.write(b"x" * len(data))
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
address = ctypes.addressof(ctypes.c_char.from_buffer(data))
write = (0, 0, 0, 1, 0, fd, address, len(data), int(sys.argv[2]), 0, 0, 0)
request = ctypes.create_string_buffer(struct.pack("=QIiHhIQQqQII", *write))
context = ctypes.c_void_p()
assert aio.io_setup(1, ctypes.byref(context)) == 0
requests = (ctypes.c_void_p * 1)(ctypes.addressof(request))
assert aio.io_submit(context, ctypes.c_long(1), requests) == 1
os.close(fd)
"""


def _submitted_and_closed(disk: Path) -> None:
    """Closed before it is written, so in the end by a kernel thread."""
    if ctypes.util.find_library("aio") is None:
        pytest.skip("no libaio (Debian package libaio1)")
    run(sys.executable, "-c", SUBMIT, disk, DATA)


def _punched(disk: Path) -> None:
    run("fallocate", "--punch-hole", "--offset", DATA, "--length", MIB, disk)


def _by_another_loop(disk: Path) -> None:
    with loop_device(disk) as other, open(other, "r+b") as f:
        f.seek(DATA)
        f.write(os.urandom(MIB))


def by_dd(to: object, at: int, size: int = MIB) -> None:
    """Written in a process of its own, and no fsync."""
    words = ["dd", "if=/dev/urandom", f"of={to}", "bs=64K", f"count={size // 65536}"]
    run(*words, f"seek={at // 65536}", "conv=notrunc", "status=none")


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize(
    "act",
    [
        lambda disk: by_dd(disk, DATA),
        _mapped,
        _submitted,
        _submitted_and_closed,
        _punched,
        _by_another_loop,
    ],
    ids=["write", "mmap", "io_submit", "io_submit and close", "punch", "another loop device"],
)
def test_what_is_written_beside_the_loop_device_arrives(
    folder: Path, act: Callable[[Path], object], direct: bool
) -> None:
    disk = image(folder)
    with loop_device(disk, options=["--direct-io=on"] if direct else []) as source:
        before = disk.read_bytes()
        got = slowly(source, folder / "copy", lambda: act(disk))
        succeeded(got)
        assert disk.read_bytes() != before
        assert same(disk, folder / "copy", SIZE)
        assert got.summary["repairs"] >= 1 and not any(r["frozen"] for r in got.repairs)


def test_a_writer_that_is_named_like_the_loop_driver_and_has_ended_is_noticed(
    folder: Path,
) -> None:
    disk = image(folder)
    dd = shutil.copy(shutil.which("dd") or "", folder / "loop-writer")
    with loop_device(disk) as source, contextlib.ExitStack() as later:

        def act() -> None:
            words = [dd, "if=/dev/urandom", f"of={disk}", "bs=1M", "count=1", "conv=notrunc"]
            writer = later.enter_context(subprocess.Popen([*words, "status=none"]))
            os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)  # a zombie from now on

        succeeded(slowly(source, folder / "copy", act))
        assert same(disk, folder / "copy", SIZE)


FEW_DESCRIPTORS = """
import os, resource, subprocess, sys
from pyploop.system import kernel

path = sys.argv[1]
fd = os.open(path, os.O_RDONLY)
watch = kernel.watch_file(fd, path)
for _ in range(2):
    subprocess.run(["dd", "if=/dev/zero", f"of={path}", "bs=1", "count=1", "status=none"])
free = os.dup(fd)  # the lowest number that is free
os.close(free)
resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, free + 1))
found = kernel.read_accesses(watch, path)
print(sum(a.closed for a in found))
"""


def test_no_event_is_dropped_where_descriptors_are_few(folder: Path) -> None:
    """The kernel opens the file of each event that is read."""
    disk = image(folder)
    done = run(sys.executable, "-c", FEW_DESCRIPTORS, disk)
    assert done == "2\n"


def test_a_file_whose_name_is_gone_is_watched_all_the_same(folder: Path) -> None:
    disk, other = image(folder), folder / "other name"
    with loop_device(disk) as source:
        os.link(disk, other)
        disk.unlink()
        got = slowly(source, folder / "copy", lambda: by_dd(other, MIB))
        succeeded(got)
        assert got.summary["repairs"] >= 1
        assert same(other, folder / "copy", SIZE)


def test_a_file_that_is_written_below_an_overlay_is_watched_there_too(folder: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (folder / name).mkdir()
    disk = image(folder / "upper")
    options = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
    with (
        mounted("overlay", folder / "merged", options, "overlay") as merged,
        loop_device(merged / disk.name) as source,
    ):
        for number, file in enumerate((disk, merged / disk.name)):
            target = folder / f"copy{number}"
            got = slowly(source, target, partial(by_dd, file, MIB))
            succeeded(got)
            assert got.summary["repairs"] >= 1
            assert same(disk, target, SIZE)


def test_a_plain_file_that_is_attached_meanwhile_ends_the_copy(folder: Path) -> None:
    disk = image(folder)
    with contextlib.ExitStack() as later:
        devices: list[str] = []

        def act() -> None:
            devices.append(later.enter_context(loop_device(disk)))
            later.enter_context(mounted(devices[0], folder / "m"))

        got = slowly(str(disk), folder / "copy", act)
        assert got.code == 14, got.errors
        assert devices[0] in got.errors and not (folder / "copy").exists()


def test_what_an_idle_second_loop_device_gets_arrives(folder: Path) -> None:
    """With its accounting switched off, too, which is put back."""
    disk = image(folder)
    with loop_device(disk) as source, loop_device(disk) as other:
        switch = Path(f"/sys/block/{Path(other).name}/queue/iostats")
        with accounting_on_again(switch):
            for on in ("1", "0"):
                switch.write_text(on)
                target = folder / f"copy-{on}"
                succeeded(slowly(source, target, lambda: by_dd(other, DATA)))
                assert same(disk, target, SIZE)
                assert switch.read_text().strip() == on


@contextlib.contextmanager
def accounting_on_again(switch: Path) -> Iterator[None]:
    """Before and after: the next loop device of this number has it as it is left."""
    switch.write_text("1")
    try:
        yield
    finally:
        switch.write_text("1")


@pytest.mark.parametrize("left", ["0", "1"])
def test_what_a_second_loop_device_gets_while_its_accounting_is_off_arrives(
    folder: Path, left: str
) -> None:
    disk = image(folder)
    with loop_device(disk) as source, loop_device(disk) as other:
        switch = Path(f"/sys/block/{Path(other).name}/queue/iostats")

        def act() -> None:
            switch.write_text("0")
            run("dd", "if=/dev/urandom", f"of={other}", "bs=1M", "count=1", "oflag=direct")
            switch.write_text(left)

        with accounting_on_again(switch):
            succeeded(slowly(source, folder / "copy", act))
            assert same(disk, folder / "copy", SIZE)
            assert switch.read_text().strip() == left


@pytest.mark.invariant(number=9)
def test_a_write_to_the_file_during_the_freeze_arrives_or_ends_the_copy(folder: Path) -> None:
    disk = image(folder)
    dd = f"dd if=/dev/urandom of={shlex.quote(str(disk))} bs=64K seek=200 conv=notrunc status=none"
    with loop_device(disk) as source, mounted(source, folder / "m"):
        got = copy(source, folder / "once", "-F", f"{dd} count=4", via="local")
        succeeded(got)
        assert [r["frozen"] for r in got.repairs] == [True]
        assert got.repairs[0]["sent"] == 4 * 65536
        go, wrote, over = folder / "go", folder / "wrote", folder / "over"
        # One process: between two of dd a slow machine has time for a whole freeze.
        writer = folder / "writer.py"
        writer.write_text(
            "import os, sys\n"
            "while os.path.exists(sys.argv[2]):\n"
            "    with open(sys.argv[1], 'r+b', buffering=0) as f:\n"
            "        os.pwrite(f.fileno(), os.urandom(4096), 200 << 16)\n"
            "    open(sys.argv[3], 'w').close()\n"
        )
        words = shlex.join([sys.executable, str(writer), str(disk), str(go), str(wrote)])
        again = f"({words}; : >{over}) >/dev/null 2>&1 & until [ -e {wrote} ]; do sleep 0.01; done"
        for _ in range(20):
            go.touch()
            try:
                got = copy(source, folder / "always", "-F", again, via="local")
            finally:
                go.unlink()
                wait_until(over.exists, "the end of the writer")
            if got.code:
                break
            # A busy machine let it write before the comparison, and not again after that.
            succeeded(got)
            assert any(r["frozen"] for r in got.repairs), got.errors
            for file in (wrote, over, folder / "always"):
                file.unlink()
        assert got.code == 14, got.errors
        assert not (folder / "always").exists()


def test_who_opens_the_file_during_the_freeze_may_read_it_but_not_write_it(folder: Path) -> None:
    disk = image(folder)
    with loop_device(disk) as source, mounted(source, folder / "m"):
        got = copy(source, folder / "read", "-F", f"head -c 1 {disk} >/dev/null", via="local")
        succeeded(got)
        assert not got.repairs
        held = f"sleep 3 8<>{disk} >/dev/null 2>&1 & sleep 0.2"
        got = copy(source, folder / "held", "-F", held, via="local")
        assert got.code == 14, got.errors
        assert "(sleep) has" in got.errors and not (folder / "held").exists()


@pytest.mark.invariant(number=9)
def test_a_second_loop_device_that_is_mounted_meanwhile_ends_the_copy(folder: Path) -> None:
    disk = image(folder)
    with (
        loop_device(disk) as source,
        contextlib.ExitStack() as later,
    ):

        def act() -> None:
            other = later.enter_context(loop_device(disk))
            later.enter_context(mounted(other, folder / "m"))

        got = slowly(source, folder / "copy", act)
        assert got.code == 14, got.errors
        assert str(folder / "m") in got.errors and "began during the copy" in got.errors
        assert not (folder / "copy").exists()


@pytest.mark.parametrize("how", ["open", "mapped"])
def test_a_process_that_can_write_the_backing_file_is_named(folder: Path, how: str) -> None:
    disk = image(folder)
    code = "import mmap, os, sys; f = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(f, 0); "
    code += "os.closerange(3, 99); " if how == "mapped" else "m.close(); "
    code += "print(flush=True); sys.stdin.read()"
    with (
        loop_device(disk) as source,
        subprocess.Popen(
            [sys.executable, "-c", code, str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder,
    ):
        assert holder.stdout and holder.stdout.readline()
        refused(source, folder / "copy", f"process {holder.pid} (", f"{how} for writing")


def test_that_not_all_who_have_the_backing_file_open_can_be_seen_is_said(folder: Path) -> None:
    needs("capsh")
    disk = image(folder)
    sender = ["capsh", "--drop=cap_sys_ptrace", "--", "-c", 'exec "$@"', "sh"]
    sender += [*pyploop_cmd(), "copy"]
    with loop_device(disk) as source:
        for said, words in ((True, sender), (False, None)):
            got = copy(source, folder / f"copy-{said}", via="local", sender=words)
            succeeded(got)
            assert ("CAP_SYS_PTRACE" in got.errors) == said


HIDDEN = """
import ctypes, mmap, os, sys, threading
how, path = sys.argv[1:]
libc = ctypes.CDLL(None)
ctypes.CDLL("libgcc_s.so.1")  # pthread_exit loads it, and closerange could close its file

def use():
    if "unshared" in how:
        assert libc.unshare(0x400) == 0  # CLONE_FILES
    f = os.open(path, os.O_RDWR)
    if "mapped" in how:
        m = mmap.mmap(f, 0)
        os.closerange(3, 99)
    os.write(1, b"\\n")
    sys.stdin.read()

threading.Thread(target=use).start()
if "ended" in how:
    libc.pthread_exit(None)
"""


@pytest.mark.parametrize("how", ["open, unshared", "open, ended", "mapped, ended"])
def test_what_only_a_later_thread_of_a_process_can_write_is_named(folder: Path, how: str) -> None:
    disk = image(folder)
    with (
        loop_device(disk) as source,
        subprocess.Popen(
            [sys.executable, "-c", HIDDEN, how, str(disk)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as holder,
    ):
        assert holder.stdout and holder.stdout.readline()
        try:
            if "ended" in how:
                wait_until(
                    lambda: not os.listdir(f"/proc/{holder.pid}/fd"), "the first thread ends"
                )
            named = f"{how.partition(',')[0]} for writing"
            refused(source, folder / "copy", f"process {holder.pid} (", named)
        finally:
            holder.kill()


def test_a_process_that_opens_the_backing_file_and_keeps_it_ends_the_copy(folder: Path) -> None:
    disk = image(folder)
    with loop_device(disk) as source, contextlib.ExitStack() as later:
        got = slowly(source, folder / "copy", lambda: later.enter_context(disk.open("r+b")))
        assert got.code == 14, got.errors
        assert f"process {os.getpid()} (" in got.errors
        assert not (folder / "copy").exists()


# ---- in use, and mountinfo does not say so


@pytest.mark.parametrize("fstype", ["ext4", "xfs", "btrfs"])
def test_a_file_system_that_lives_on_without_a_mount_is_named(folder: Path, fstype: str) -> None:
    needs(f"mkfs.{fstype}")
    disk = sparse_file(folder / "image", (320 if fstype == "xfs" else 128) * MIB)
    run(f"mkfs.{fstype}", "-q", disk)
    with loop_device(disk) as source:
        with mounted(source, folder / "m") as point:
            kept = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
            run("umount", "--lazy", point)
        try:
            with os.fdopen(os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=kept), "wb") as f:
                f.write(os.urandom(MIB))
            refused(source, folder / "copy", source, fstype)
            # It can be frozen by what leads there, and then nothing is missing.
            way = f"/proc/{os.getpid()}/fd/{kept}"
            if fstype != "btrfs":
                check = comparison(disk, folder / "copy", disk.stat().st_size)
                options = ["--mount", way, "--before-thaw", check]
                succeeded(copy(source, folder / "copy", *options, via="local"))
        finally:
            os.close(kept)
        wait_until(lambda: _is_free(source), f"{source} is free")


def with_a_dev_of_its_own(source: str) -> list[str]:
    """A sender for which no device has a node but the source."""
    needs("unshare")
    dev = os.stat(source).st_rdev
    script = (
        "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9 && "
        f'mknod {source} b {os.major(dev)} {os.minor(dev)} && exec "$@"'
    )
    return ["unshare", "--mount", "sh", "-c", script, "sh", *pyploop_cmd(), "copy"]


def test_devices_that_have_no_node_here_are_looked_at_all_the_same(folder: Path) -> None:
    disk = image(folder)
    with (
        loop_device(disk) as source,
        loop_device(disk) as other,
        partition(source, 1, MIB, 8 * MIB) as part,
    ):
        sender = with_a_dev_of_its_own(source)
        with open(part, "r+b") as f:
            f.write(os.urandom(MIB))
            f.flush()  # to its page cache
            succeeded(copy(source, folder / "copy", via="local", sender=sender))
            os.fsync(f.fileno())
        assert same(disk, folder / "copy", SIZE)
        with mounted(other, folder / "m") as point:
            kept = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
            run("umount", "--lazy", point)
        try:
            refused(source, folder / "refused", other, "a live ext4", sender=sender)
        finally:
            os.close(kept)
        wait_until(lambda: _is_free(other), f"{other} is free")


def test_a_device_that_has_no_node_and_can_get_none_is_named(folder: Path) -> None:
    needs("capsh")
    disk = image(folder)
    with loop_device(disk) as source, partition(source, 1, MIB, 8 * MIB) as part:
        words = with_a_dev_of_its_own(source)
        at = words.index("sh", 5)
        words[at + 1 : at + 1] = ["capsh", "--drop=cap_mknod", "--", "-c", 'exec "$@"', "sh"]
        refused(source, folder / "copy", f"cannot open {part}", sender=words)
        got = copy(source, folder / "copy", "--unsafe-in-use", via="local", sender=words)
        succeeded(got)
        assert same(disk, folder / "copy", SIZE)


def _is_free(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("levels", [1, 2])
def test_a_file_system_on_loop_devices_above_the_source_is_frozen(
    folder: Path, levels: int
) -> None:
    disk = image(folder)
    with contextlib.ExitStack() as stack:
        source = top = stack.enter_context(loop_device(disk))
        for _ in range(levels):
            top = stack.enter_context(loop_device(top))
        point = stack.enter_context(mounted(top, folder / "m"))
        for device in (source, top):
            target = folder / f"copy-{Path(device).name}"
            (point / target.name).write_bytes(os.urandom(MIB))
            got = copy(device, target, "--before-thaw", comparison(disk, target, SIZE), via="local")
            succeeded(got)
            assert "freeze" in got.summary["frozen"]
            with loop_device(target) as back, mounted(back, folder / "n", "ro,norecovery") as n:
                assert (n / target.name).read_bytes() == (point / target.name).read_bytes()


def test_a_file_system_on_a_file_of_the_one_that_is_frozen_is_named(folder: Path) -> None:
    disk = image(folder)
    with loop_device(disk) as source, mounted(source, folder / "m") as point:
        inner = sparse_file(point / "inner", 4 * MIB)
        run("mkfs.ext4", "-q", "-F", inner)
        with loop_device(inner) as other, mounted(other, folder / "n") as inside:
            for options, said in (("rw", True), ("ro", False)):
                run("mount", "-o", f"remount,{options}", inside)
                got = copy(source, folder / options, via="local")
                succeeded(got)
                line = f"Not frozen: {other} is mounted at {inside} (ext4), from {inner} on"
                assert (line in got.errors) == said


@pytest.mark.parametrize("kind", ["journal of ext4", "log of XFS", "second device of btrfs"])
def test_a_device_that_another_file_system_writes_too(folder: Path, kind: str) -> None:
    needs("mkfs.xfs", "mkfs.btrfs")
    main, extra = sparse_file(folder / "main", 320 * MIB), sparse_file(folder / "extra", 128 * MIB)
    with loop_device(main) as a, loop_device(extra) as b:
        options = "rw"
        if kind == "journal of ext4":
            run("mke2fs", "-q", "-F", "-b", "4096", "-O", "journal_dev", b)
            run("mkfs.ext4", "-q", "-F", "-b", "4096", "-J", f"device={b}", a)
        elif kind == "log of XFS":
            run("mkfs.xfs", "-q", "-f", "-l", f"logdev={b}", a)
            options = f"rw,logdev={b}"
        else:
            run("mkfs.btrfs", "-q", "-f", a, b)
            options = f"rw,device={a},device={b}"
        with mounted(a, folder / "m", options) as point:
            (point / "f").write_bytes(os.urandom(MIB))
            if kind == "journal of ext4":  # of which file system, the kernel does not tell
                refused(b, folder / "copy", b, "journal")
                return
            check = comparison(extra, folder / "copy", 128 * MIB)
            got = copy(b, folder / "copy", "--before-thaw", check, via="local")
            succeeded(got)
            assert "freeze" in got.summary["frozen"]


def test_swap_space_on_the_source_is_named(folder: Path) -> None:
    needs("mkswap", "swapon")
    disk = image(folder)
    with loop_device(disk) as source:
        with mounted(source, folder / "m") as point:
            file = point / "swap"
            file.write_bytes(bytes(2 * MIB))
            file.chmod(0o600)
            with swapped_on(file):
                refused(source, folder / "copy", f"swapoff {file}")
        with swapped_on(source):
            refused(source, folder / "copy", f"swapoff {source}")
        disk.write_bytes(disk.read_bytes())  # without holes
        disk.chmod(0o600)
        with swapped_on(disk):
            refused(source, folder / "copy", f"swapoff {disk}")
    with swapped_on(disk):
        refused(str(disk), folder / "copy", f"swapoff {disk}")


@contextlib.contextmanager
def swapped_on(path: object) -> Iterator[None]:
    run("mkswap", "-q", path)
    run("swapon", path)
    try:
        yield
    finally:
        run("swapoff", path)


def test_unsafe_in_use_copies_all_the_same_and_says_so(folder: Path) -> None:
    disk = image(folder)
    with (
        loop_device(disk) as source,
        loop_device(disk) as other,
        mounted(other, folder / "m"),
    ):
        got = copy(source, folder / "copy", "--unsafe-in-use", via="local")
        succeeded(got)
        assert "UNSAFE" in got.errors and other in got.errors
        (said,) = got.summary["unsafe"]
        assert said.startswith(f"{other} is mounted at {folder}/m")


# ---- page caches


@pytest.mark.parametrize("read", ["auto", "device"])
@pytest.mark.parametrize("stacked", ["partition", "loop device on it"])
@pytest.mark.parametrize("by", ["disk", "partition", "loop device on it"])
def test_a_write_through_any_device_of_the_pile_arrives(
    folder: Path, stacked: str, by: str, read: str
) -> None:
    disk = sparse_file(folder / "image", SIZE + MIB)
    disk.write_bytes(os.urandom(SIZE + MIB))
    with (
        loop_device(disk) as whole,
        partition(whole, 1, MIB, SIZE) as part,
        loop_device(part) as above,
    ):
        source = part if stacked == "partition" else above
        to, at = {"disk": (whole, MIB), "partition": (part, 0), "loop device on it": (above, 0)}[by]
        act = partial(by_dd, to, at)
        got = slowly(source, folder / "copy", act, "--read", read)
        succeeded(got)
        run("sync", disk)
        assert same(disk, folder / "copy", SIZE, offset=MIB)


# ---- between rounds


@pytest.mark.parametrize("what", ["source", "new partition", "new loop device on it"])
def test_a_file_system_that_is_mounted_meanwhile_is_frozen_too(folder: Path, what: str) -> None:
    disk = image(folder)
    with loop_device(disk) as source, contextlib.ExitStack() as later:

        def act() -> None:
            device = source
            if what == "new partition":
                device = later.enter_context(partition(source, 1, 4 * MIB, 16 * MIB))
                run("mkfs.ext4", "-q", "-F", device)
            elif what == "new loop device on it":
                device = later.enter_context(loop_device(source))
            point = later.enter_context(mounted(device, folder / "m"))
            (point / "f").write_bytes(os.urandom(MIB))

        check = comparison(disk, folder / "copy", SIZE)
        got = slowly(source, folder / "copy", act, "--before-thaw", check)
        succeeded(got)
        assert got.summary["frozen"]["freeze"] > 0
        offset = 4 * MIB if what == "new partition" else 0
        with (
            loop_device(folder / "copy", offset=offset) as back,
            mounted(back, folder / "n", "ro,norecovery") as copied,
        ):
            assert (copied / "f").read_bytes() == (folder / "m/f").read_bytes()


def test_swap_space_and_growth_during_a_copy_are_told_before_the_freeze(folder: Path) -> None:
    needs("mkswap", "swapon")
    disk = image(folder)
    with loop_device(disk) as source, mounted(source, folder / "m") as point:
        file = point / "swap"
        file.write_bytes(bytes(2 * MIB))
        file.chmod(0o600)
        with contextlib.ExitStack() as later:
            got = slowly(source, folder / "copy", lambda: later.enter_context(swapped_on(file)))
        assert got.code == 14 and f"swapoff {file}" in got.errors
        assert not in_phase(got, "frozen")

        def grow() -> None:
            os.truncate(disk, SIZE + MIB)
            run("losetup", "--set-capacity", source)

        got = slowly(source, folder / "grown", grow)
        assert got.code == 6 and str(SIZE + MIB) in got.errors
        assert not in_phase(got, "frozen")


def test_a_mount_in_another_namespace_during_a_copy_is_told_before_the_freeze(
    folder: Path,
) -> None:
    needs("unshare")
    disk = image(folder)
    (folder / "m").mkdir()
    script = f"mount {{}} {folder}/m && echo && read x"
    with loop_device(disk) as source, contextlib.ExitStack() as later:

        def act() -> None:
            words = ["unshare", "--mount", "sh", "-c", script.format(source)]
            other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            later.enter_context(other)
            assert other.stdout and other.stdout.readline() == b"\n"

        got = slowly(source, folder / "copy", act)
        assert got.code == 14 and "--mount /proc/" in got.errors
        assert not in_phase(got, "frozen")


def test_a_mount_in_another_namespace_by_the_stop_command_ends_the_copy(folder: Path) -> None:
    needs("unshare")
    disk = image(folder)
    (folder / "m").mkdir()
    go, over = folder / "go", folder / "over"
    go.touch()
    goes_on = f"mount {{}} {folder}/m && : >{folder}/there; while [ -e {go} ]; do sleep 0.02; done"
    with loop_device(disk) as source:
        stop = f"(unshare --mount sh -c {shlex.quote(goes_on.format(source))}; : >{over})"
        stop += f" >/dev/null 2>&1 & while [ ! -e {folder}/there ]; do sleep 0.02; done"
        try:
            got = copy(source, folder / "copy", "-F", stop, via="local")
        finally:
            go.unlink()
            wait_until(over.exists, "the end of the namespace")
        assert got.code == 14, got.errors
        assert "is mounted in another mount namespace" in got.errors
        assert not (folder / "copy").exists()


# ---- names are bytes


def test_a_loop_device_on_a_file_whose_name_is_no_text_harms_nobody(folder: Path) -> None:
    strange = folder / os.fsdecode(b"caf\xe9 \xff")
    image(folder).rename(strange)
    plain = folder / "plain"
    plain.write_bytes(os.urandom(MIB))
    with loop_device(strange) as source:
        succeeded(copy(plain, folder / "one", via="local"))
        for number, what in enumerate((source, str(strange))):
            got = copy(what, folder / f"copy{number}", via="local")
            succeeded(got)
            assert "Traceback" not in got.errors
            assert same(strange, folder / f"copy{number}", SIZE)
        assert "backing file" in got.summary["io_mode"]


def test_a_program_whose_name_is_no_text_is_named(folder: Path) -> None:
    disk = image(folder)
    program = folder / os.fsdecode(b"w\xffiter")
    program.symlink_to(sys.executable)
    code = "import sys; f = open(sys.argv[1], 'r+b'); print(flush=True); sys.stdin.read()"
    with (
        loop_device(disk) as source,
        subprocess.Popen(
            [program, "-I", "-S", "-c", code, disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder,
    ):
        assert holder.stdout and holder.stdout.readline()
        refused(source, folder / "copy", f"process {holder.pid} (w\\udcffiter)")


def test_one_who_writes_a_plain_file_is_named_and_the_copy_goes_on(folder: Path) -> None:
    disk = image(folder)
    with disk.open("r+b"):
        got = copy(disk, folder / "copy", via="local")
    succeeded(got)
    assert f"process {os.getpid()} (" in got.errors and "-F" in got.errors
    assert same(disk, folder / "copy", SIZE)
