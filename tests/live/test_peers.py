# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0917 - a matrix of cases
"""C: the C tool at either end, under load.  Its sender, and ours with
`--tracker ploop`, see a made-up /dev/ploop0 (tests/fakeploop)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import fakeploop
import pytest
from support import (
    MIB,
    loop_device,
    mounted,
    needs,
    pyploop_cmd,
    pyploop_env,
    run,
    telling,
    tmpfs,
)
from support_live import (
    C_RECEIVER,
    Copied,
    Copy,
    copy,
    file_system,
    fio,
    note,
    random_file,
    same,
    sparse_file,
    succeeded,
    work_dir,
)

pytestmark = pytest.mark.root

SIZE = 64 * MIB
CLUSTER = MIB
WRITES = ["--rw=randwrite", "--bsrange=4k-256k", "--fsync=16", "--ioengine=psync"]
C_SENDER = ("ploop", "copy")
HEADER = (
    b"WithoutFreeSpace" + bytes(28) + (0x746F6E59).to_bytes(4, "little") + bytes(range(1, 209)) * 2
)
"""Of a ploop1 image in use; only its size and bytes 44..47 matter here."""
IN_USE = slice(44, 48)

ways = pytest.mark.parametrize("via", ["pipe", "mute"])


@pytest.fixture
def folder() -> Iterator[Path]:
    needs("loop", "fio", "mkfs.ext4", "ploop", "cc")
    with work_dir() as path:
        yield path


@pytest.fixture(scope="module")
def library(build_cache: Path) -> Path:
    needs("cc")
    return fakeploop.build(build_cache)


@pytest.mark.parametrize(("via", "compat"), [("pipe", "auto"), ("mute", "auto"), ("pipe", "ploop")])
def test_the_c_receiver_gets_a_live_copy_of_ours(folder: Path, via: str, compat: str) -> None:
    image = sparse_file(folder / "image", SIZE)
    target, frozen = folder / "target", folder / "frozen"
    with (
        loop_device(image) as device,
        file_system(device, folder / "mnt") as point,
        fio(point, "w", *WRITES, f"--size={SIZE // 4}"),
    ):
        options = (
            "--tracker",
            "bpf",
            "--sync-wait",
            "0.2",
            "--compat",
            compat,
            "--before-thaw",
            f"cp {image} {frozen}",
        )
        got = copy(device, target, *options, via=via, receiver=C_RECEIVER)
    note(f"C receiver {via}", got, target)
    succeeded(got)
    assert same(frozen, target, SIZE)
    peer = "ploop peer" if via == "pipe" else "perhaps a ploop peer"
    if compat == "ploop":
        peer = "as ploop sends it"
    assert got.summary["dialect"] == f"D1, {peer}"
    assert got.summary["acknowledged"] == "unknown"


def ploop1_image(path: Path, size: int) -> Path:
    random_file(path, size)
    with path.open("r+b") as f:
        f.write(HEADER)
    return path


def script(path: Path, size: int) -> Path:
    """Writes and dirty extents of the running pass and the frozen one: the C
    sender has no more when there is feedback."""
    passes = [
        [(MIB, 2 * MIB), (3 * MIB, 7 * MIB), (8 * MIB + 4096, 8 * MIB + 8192)],
        [(4096 * k, 4096 * (k + 1)) for k in range(2, 600, 7)] + [(size - 4096, size)],
    ]
    lines = []
    for number, extents in enumerate(passes):
        for byte, (start, end) in zip(itertools.count(number * 50 + 1), extents, strict=False):
            lines += [f"write {start} {end - start} {byte % 256}", f"{start} {end}"]
        lines.append("--")
    path.write_text("\n".join(lines) + "\n")
    return path


def check_target(truth: Path, target: Path, fmt: str) -> None:
    want, got = truth.read_bytes(), target.read_bytes()
    if fmt == "ploop1":
        assert got[IN_USE] == bytes(4), "the copy is marked as in use"
        assert want[IN_USE] == HEADER[IN_USE]
        want = want[: IN_USE.start] + bytes(4) + want[IN_USE.stop :]
    wrong = [k for k in range(0, len(want), 4096) if want[k : k + 4096] != got[k : k + 4096]]
    assert len(want) == len(got) and not wrong, f"{len(wrong)} blocks differ: {wrong[:8]}"


@ways
@pytest.mark.parametrize("fmt", ["raw", "ploop1"])
@pytest.mark.parametrize("sender", ["C", "ours"])
@pytest.mark.parametrize("receiver", ["C", "ours"])
@pytest.mark.invariant(number=1)
@pytest.mark.invariant(number=8)
def test_scripted_writes_arrive_between_all_senders_and_receivers(
    folder: Path, library: Path, via: str, fmt: str, sender: str, receiver: str
) -> None:
    size = 12 * MIB
    image = (ploop1_image if fmt == "ploop1" else random_file)(folder / "image", size)
    target, mount = folder / "target", folder / "mnt"
    # Of another file system than the target, which must not be frozen with it.
    with tmpfs(mount, MIB):
        scripted_copy(library, image, target, mount, via, fmt, sender, receiver)


def scripted_copy(
    library: Path, image: Path, target: Path, mount: Path, via: str, fmt: str, sender: str,
    receiver: str,
) -> None:  # fmt: skip
    folder, size = image.parent, image.stat().st_size
    env = fakeploop.env(
        library,
        image,
        folder,
        fmt=fmt,
        mount=mount,
        track=f"script:{script(folder / 'script', size)}",
        sleep=False,
    )
    got = peer_copy(target, "true", via, sender, receiver, env)
    note(f"fake script {fmt} {sender}->{receiver} {via}", got, target)
    succeeded(got)
    check_target(image, target, fmt)
    ops = [line.op for line in fakeploop.read_log(folder / "log")]
    assert ops.count("TRACK_INIT") == ops.count("TRACK_STOP") == 1 and "TRACK_ABORT" not in ops
    if sender == "ours":
        assert got.summary["tracker"] == "ploop"
        native = receiver == "ours" and via == "pipe"
        assert got.summary["acknowledged"] == ("acknowledged" if native else "unknown")


def peer_copy(
    target: Path, stop: str, via: str, sender: str, receiver: str, env: dict[str, str], *more: str
) -> Copied:
    ours = sender == "ours"
    options = ["-F", stop]
    if ours:
        options += ["--tracker", "ploop", "--sync-wait", "0.2", *more]
    return copy(
        "/dev/ploop0",
        target,
        *options,
        via=via,
        sender=None if ours else C_SENDER,
        receiver=C_RECEIVER if receiver == "C" else None,
        env=env,
        json_events=ours,
    )


@ways
@pytest.mark.parametrize("fmt", telling(["ploop1", "raw"], 0))
@pytest.mark.parametrize(("sender", "receiver"), [("C", "ours"), ("ours", "C"), ("ours", "ours")])
def test_a_live_ploop_device_arrives_between_all_senders_and_receivers(
    folder: Path, library: Path, via: str, fmt: str, sender: str, receiver: str
) -> None:
    base = CLUSTER if fmt == "ploop1" else 0
    image = sparse_file(folder / "image", base + SIZE)
    if base:
        with image.open("r+b") as f:
            f.write(HEADER)
    target, frozen, point = folder / "target", folder / "frozen", folder / "mnt"
    with (
        loop_device(image, offset=base) as device,
        file_system(device, point),
        fio(point, "w", *WRITES, f"--size={SIZE // 4}"),
    ):
        # The C tool has no --before-thaw; it stays frozen when its thaw fails.
        env = fakeploop.env(
            library,
            device,
            folder,
            image=image,
            fmt=fmt,
            mount=point,
            track="bpf",
            sleep=False,
            fail="FITHAW:EIO" if sender == "C" else None,
        )
        more = ("--before-thaw", f"cp {image} {frozen}")
        got = peer_copy(target, "true", via, sender, receiver, env, *more)
        if sender == "C":
            try:
                run("cp", image, frozen)
            finally:
                run("fsfreeze", "-u", point)
    note(f"fake bpf {fmt} {sender}->{receiver} {via}", got, target)
    succeeded(got)
    check_target(frozen, target, fmt)


@pytest.mark.parametrize("compat", ["auto", "native", "ploop"])
def test_what_is_written_after_the_end_stays_out_of_a_one_way_pipe(
    folder: Path, compat: str
) -> None:
    image, target = folder / "image", folder / "target"
    size = MIB // 2  # all of it fits into the pipe, which nobody reads meanwhile
    before = random_file(image, size).read_bytes()
    inp, out = os.pipe()
    try:
        with loop_device(image) as device:
            send = ["copy", "-s", device, "-o", str(out), "--tracker", "bpf", "--compat", compat]
            run(*pyploop_cmd(), *send, "--read", "backing", pass_fds=[out], env=pyploop_env())
            os.close(out)
            out = -1
            Path(device).write_bytes(bytes(size))
            receive = ["copy", "-d", str(target), "-i", str(inp)]
            run(*pyploop_cmd(), *receive, pass_fds=[inp], env=pyploop_env())
    finally:
        for fd in (inp, out):
            if fd >= 0:
                os.close(fd)
    assert target.read_bytes() == before


@pytest.mark.parametrize("size", [MIB + 4, 4, 4100, MIB, 5 * MIB + 512])
def test_the_c_receiver_gets_every_byte_of_an_odd_file(folder: Path, size: int) -> None:
    image, target = random_file(folder / "image", size), folder / "target"
    succeeded(copy(image, target, "--tracker", "scan", receiver=C_RECEIVER))
    assert target.read_bytes() == image.read_bytes()


def test_a_c_receiver_that_cannot_write_ends_the_copy(folder: Path) -> None:
    image = random_file(folder / "image", 8 * MIB)
    point = folder / "small"
    with mounted("tmpfs", point, f"size={2 * MIB}", "tmpfs"):
        with Copy(
            image,
            point / "target",
            "--json",
            str(folder / "events"),
            receiver=C_RECEIVER,
            json_events=False,
        ) as running:
            got = running.wait()
        assert got.code == 7, got.errors
        assert got.receiver_code == 7
        assert not list(point.iterdir())
