# SPDX-License-Identifier: Apache-2.0
"""csrc/tmpfs_tar, under sanitizers: what it packs, it and GNU tar unpack; and an archive
that it has not packed makes nothing outside the folder."""

from __future__ import annotations

import ctypes
import gzip
import os
import random
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import support

MAGIC = b"ustar  \0"
CREATE = ["--create", "--gzip", "--no-unquote", "--no-wildcards", "--one-file-system"]
CREATE += ["--check-links", "--preserve-permissions", "--sparse", "--numeric-owner", "--directory"]
EXTRACT = ["--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory"]
"""What CRIU 4.2 asks tar for."""
pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    support.needs("gcc")
    program = tmp_path_factory.mktemp("built") / "tar"
    sources = sorted(map(str, (support.ROOT / "csrc/tmpfs_tar").glob("*.c")))
    words = ["gcc", "-std=gnu11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
    words += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-o", str(program)]
    subprocess.run([*words, *sources], check=True, timeout=120)
    return program


def run(
    tar: Path, words: list[str], data: bytes = b"", packing: str = ""
) -> tuple[int, bytes, str]:
    """Exit code, stdout and stderr.  The archive is a file, as CRIU's."""
    env = {"PATH": f"{tar.parent}:{os.environ['PATH']}", "ASAN_OPTIONS": "detect_leaks=0"}
    if packing:
        env["PYPLOOP_TMPFS"] = packing
    given, made = (os.memfd_create(name) for name in ("given", "made"))
    with os.fdopen(given, "w+b") as stdin, os.fdopen(made, "w+b") as stdout:
        stdin.write(data)
        stdin.seek(0)
        done = subprocess.run(
            [tar, *words],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=env,
            timeout=60,
            check=False,
        )
        stdout.seek(0)
        return done.returncode, stdout.read(), done.stderr.decode(errors="replace")


def pack(tar: Path, folder: Path, packing: str) -> bytes:
    code, made, errors = run(tar, [*CREATE, str(folder), "."], packing=packing)
    assert code == 0, errors
    return made


def files(folder: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        st = path.lstat()
        contents = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        target = os.readlink(path) if path.is_symlink() else ""
        found[str(path.relative_to(folder))] = (st.st_mode, st.st_mtime_ns, contents, target)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some files.  tests/migrate/test_tmpfs.py has all kinds."""
    made = tmp_path / "folder"
    (made / "a/b").mkdir(parents=True)
    (made / "a/b/data").write_bytes(bytes(range(256)) * 1000)
    (made / "a/link").symlink_to("b")
    with (made / "holes").open("wb") as f:
        for n in range(30):
            f.seek(n << 20)
            f.write(b"x" * 5000)
        f.truncate(40 << 20)
    os.utime(made / "a/b/data", ns=(1, 1_234_567_890_123_456_789))
    return made


@pytest.mark.parametrize("packing", ["plain", "wrapped"])
@pytest.mark.parametrize("unpack", ["ours", "gnu"])
def test_what_it_packs_is_unpacked_as_it_was(
    tar: Path, folder: Path, tmp_path: Path, packing: str, unpack: str
) -> None:
    archive = pack(tar, folder, packing)
    out = tmp_path / "out"
    out.mkdir()
    if unpack == "gnu" or packing == "wrapped":
        plain = gzip.decompress(archive) if packing == "wrapped" else archive
        words = ["/usr/bin/tar", "--extract", "--directory", str(out)]
        subprocess.run(words, input=plain, check=True, timeout=60)
    else:
        code, _, errors = run(tar, [*EXTRACT, str(out)], archive)
        assert code == 0, errors
    assert files(out) == files(folder)
    assert (out / "holes").stat().st_blocks * 512 < 8 << 20


def test_names_of_the_greatest_length_and_times_of_any_size_move(tar: Path, tmp_path: Path) -> None:
    """A container may have them, and must not become immovable."""
    source, out = tmp_path / "source", tmp_path / "out"
    seconds = [-(1 << 63), -(1 << 63) + 1, -1, 0, 10**16, (1 << 63) - 1]
    for folder in (source, out):
        folder.mkdir()
        run_in(folder, "mount -t tmpfs none .")
    try:
        at = os.open(source, os.O_PATH)
        for n in range(4095 - len("./"), 0, -201):  # with each "/"
            name = ("d" if n > 201 else "f") * min(n, 200)
            if n > 201:
                os.mkdir(name, dir_fd=at)
                inner = os.open(name, os.O_PATH, dir_fd=at)
                os.close(at)
                at = inner
            else:
                os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=at))
        os.close(at)
        for n, second in enumerate(seconds):
            (source / f"t{n}").touch()
            set_time(source / f"t{n}", second)
        archive = pack(tar, source, "plain")
        code, _, errors = run(tar, [*EXTRACT, str(out)], archive)
        assert code == 0, errors
        assert [(out / f"t{n}").stat().st_mtime_ns for n in range(6)] == [
            s * 10**9 for s in seconds
        ]
        assert run_in(out, "find . -type f -name 'f*' | wc -c") == "4096\n"
    finally:
        for folder in (source, out):
            run_in(folder.parent, f"umount {folder}")


def run_in(folder: Path, command: str) -> str:
    words = ["sh", "-c", command]
    return subprocess.run(
        words, cwd=folder, check=True, timeout=60, capture_output=True, text=True
    ).stdout


def set_time(path: Path, seconds: int) -> None:
    """os.utime has no place for all seconds."""
    libc = ctypes.CDLL(None, use_errno=True)
    times = struct.pack("=4q", 0, 0, seconds, 0)
    assert libc.utimensat(-100, os.fsencode(path), times, 0) == 0, ctypes.get_errno()


def test_an_archive_in_the_format_of_gzip_goes_to_the_next_tar(
    tar: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    code, _, errors = run(tar, [*EXTRACT, str(out)], pack(tar, folder, "wrapped"))
    assert code == 0, errors
    assert files(out) == files(folder)


@pytest.mark.parametrize("words", [["--version"], [*CREATE, "/"], ["--usage"]])
def test_any_other_call_goes_to_the_next_tar(tar: Path, words: list[str]) -> None:
    there = subprocess.run(
        ["/usr/bin/tar", *words], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    code, out, _ = run(tar, words, packing="plain")
    assert (code, out) == (there.returncode, there.stdout)


# ---- hostile archives


def member(
    name: str, kind: bytes = b"0", data: bytes = b"", link: str = "", mode: int = 0o644
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode = kind, len(data), link, mode
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
    header[257:265] = MAGIC
    return summed(header) + data + bytes(-len(data) % 512)


def summed(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def pax(*records: tuple[str, bytes]) -> bytes:
    data = b""
    for key, value in records:
        rest = len(key) + len(value) + 3
        size = next(n for n in range(rest, rest + 9) if n == rest + len(str(n)))
        data += b"%d %s=%s\n" % (size, key.encode(), value)
    return member("pax", b"x", data)


def sparse(*extents: tuple[int, int], size: int, data: bytes) -> bytes:
    header = bytearray(member("sparse", b"S", data)[:512])
    for n, (at, length) in enumerate(extents):
        header[386 + 24 * n : 410 + 24 * n] = b"%011o\0%011o\0" % (at, length)
    header[483:495] = b"%011o\0" % size
    return summed(header) + data


END = bytes(1024)
HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "an absolute name": lambda out: member(f"{out.parent}/escaped"),
    "a name that goes up": lambda _: member("../escaped"),
    "a name that goes up later": lambda _: member("d", b"5") + member("d/../../escaped"),
    "a name that is ..": lambda _: member("..", b"5", mode=0o777),
    "a name that ends with ..": lambda _: member("d", b"5") + member("d/..", b"5"),
    "a name without a part": lambda _: member(""),
    "a way through a link": lambda out: (
        member("l", b"2", link=str(out.parent)) + member("l/escaped")
    ),
    "a folder that is a link": lambda out: (
        member("l", b"2", link=str(out.parent)) + member("l", b"5")
    ),
    "a file that is a link": lambda out: (
        member("l", b"2", link=f"{out.parent}/secret") + member("l")
    ),
    "a file that is there": lambda _: member("f") + member("f"),
    "a link to a file outside": lambda _: member("f", b"1", link="../secret"),
    "a link to an absolute file": lambda out: member("f", b"1", link=f"{out.parent}/secret"),
    "a link through a link": lambda out: (
        member("l", b"2", link=str(out.parent)) + member("f", b"1", link="l/secret")
    ),
    "an unknown kind": lambda _: member("f", b"7"),
    "a multi-volume file": lambda _: member("f", b"M"),
    "a damaged sum": lambda _: member("f")[:148] + b"000000\0 " + member("f")[156:],
    "another format": lambda _: (
        member("a") + summed(bytearray(member("f")[:257] + b"ustar\00000" + member("f")[265:]))
    ),
    "an end in a header": lambda _: member("a") + member("f")[:300],
    "an end in a file": lambda _: member("f", data=b"x" * 2000)[:1500],
    "no end": lambda _: member("f"),
    "a file of half of all bytes": lambda _: summed(
        bytearray(member("f")[:124] + b"\x80" + b"\xff" * 11 + member("f")[136:])
    ),
    "a number that is none": lambda _: summed(
        bytearray(member("f")[:124] + b"12345678z12\0" + member("f")[136:])
    ),
    "a name without an end": lambda _: member("L", b"L", b"n" * 5000) + member("f"),
    "a pax record that is too long": lambda _: member("x", b"x", b"99 mtime=1.0\n") + member("f"),
    "a pax record without a key": lambda _: member("x", b"x", b"5 ab\n") + member("f"),
    "a pax record without a length": lambda _: member("x", b"x", b"mtime=1\n") + member("f"),
    "a pax header that is too long": lambda _: (
        member("x", b"x", b"\0" * ((1 << 20) + 1)) + member("f")
    ),
    "a time that is none": lambda _: pax(("mtime", b"1.x")) + member("f"),
    "a time that is too long": lambda _: pax(("mtime", b"1" * 40)) + member("f"),
    "an unknown pax record": lambda _: pax(("path", b"../escaped")) + member("f"),
    "a security module's label": lambda _: (
        pax(("SCHILY.xattr.security.selinux", b"x")) + member("f")
    ),
    "an attribute with a long name": lambda _: (
        pax(("SCHILY.xattr.user." + "x" * 300, b"x")) + member("f")
    ),
    "extents that overlap": lambda _: sparse((0, 512), (256, 512), size=4096, data=bytes(1024)),
    "an extent behind the end": lambda _: sparse((8192, 512), size=4096, data=bytes(512)),
    "an extent that is too long": lambda _: sparse((0, 8192), size=4096, data=bytes(8192)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused(tar: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "secret").write_text("secret")
    before = {p: p.lstat() for p in tmp_path.iterdir() if p != out}
    mode = tmp_path.stat().st_mode
    end = b"" if "end" in what.split()[:2] else END
    code, _, errors = run(tar, [*EXTRACT, str(out)], HOSTILE[what](out) + end)
    assert (code, "Error (pyploop tar)" in errors) == (2, True), errors
    assert {p: p.lstat() for p in tmp_path.iterdir() if p != out} == before
    assert tmp_path.stat().st_mode == mode
    assert (tmp_path / "secret").read_text() == "secret"


def test_a_damaged_archive_does_nothing_outside(tar: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "holes").unlink()
    (folder / "a/b/data").write_bytes(b"x" * 700)
    with (folder / "holes").open("wb") as f:
        f.truncate(1 << 20)
        f.seek(8192)
        f.write(b"y" * 100)
    archive, rng = pack(tar, folder, "plain"), random.Random(13)
    here = tmp_path / "here"
    for n in range(40):
        out = here / f"{n}/out"
        out.mkdir(parents=True)
        damaged = bytearray(archive)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        for at in range(0, len(damaged), 512):  # else nearly all stop at a header's sum
            if damaged[at + 257 : at + 265] == MAGIC:
                damaged[at : at + 512] = summed(damaged[at : at + 512])
        code, _, errors = run(tar, [*EXTRACT, str(out)], bytes(damaged))
        assert code in (0, 2), errors
        assert sorted(p.name for p in here.iterdir()) == sorted(str(m) for m in range(n + 1))
        assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_it_says_what_is_wrong_with_a_folder(tar: Path, tmp_path: Path) -> None:
    code, _, errors = run(tar, [*CREATE, str(tmp_path / "none"), "."], packing="plain")
    assert (code, errors.count("\n")) == (2, 1)
    assert f"cannot open {tmp_path}/none: No such file" in errors
