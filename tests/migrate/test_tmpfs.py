# SPDX-License-Identifier: Apache-2.0
"""Live migrations of a container that has files in a tmpfs: they are the same on the
target, and neither host's tar or gzip has packed or unpacked them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import container, hosts, requirements, verify
from lab.hosts import Host, Lab
from moving import migrate
from support import MIB

pytestmark = [pytest.mark.root, pytest.mark.slow]

SHM = "/dev/shm"
CALLED = Path("/srv/called")
_OLDER = """
import os, sys
from pyploop.cli.main import main
from pyploop.migration.target import checks
from pyploop.runtimes.runc import tmpfs

checks.capabilities = lambda: list(checks.CAPABILITIES)
tmpfs.environment = lambda packing: dict(os.environ)
sys.exit(main())
"""
"""A pyploop from before it had a tar."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """The container runs on a.  Each host notes that its own tar or gzip was called."""
    requirements.check()
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(hosts.lab())
        for host in (made.a, made.b):
            for name in ("tar", "gzip"):
                program = host.folder / "bin" / name
                program.write_text(
                    f'#!/bin/sh\necho {name} >>{CALLED}\nexec /usr/bin/{name} "$@"\n'
                )
                program.chmod(0o755)
        stack.enter_context(container.container(made, size=64 * MIB))
        yield made


def inside(host: Host, path: str) -> Path:
    """A path of the container, as the test sees it."""
    pid = json.loads(host.run("runc", "state", container.NAME))["pid"]
    return host.outside(f"/proc/{pid}/root{path}")


def called(host: Host) -> set[str]:
    """Which programs of the host were called; from now on anew."""
    note = host.outside(CALLED)
    found = set(note.read_text().split()) if note.exists() else set()
    note.unlink(missing_ok=True)
    return found


def moved(lab: Lab, source: Host) -> list[dict[str, Any]]:
    """The events of a migration that must succeed."""
    target = lab.other(source)
    container.clear_bundle(target)
    container.write_bundle(source)
    called(source), called(target)
    done = migrate(lab, source)
    assert done.code == 0, done.errors
    return done.events


def packings(events: list[dict[str, Any]]) -> set[str]:
    return {e["packing"] for e in events if e["event"] == "tmpfs"}


def fill(folder: Path, seed: int) -> None:
    """Everything that a tmpfs can have."""
    rng = random.Random(seed)
    (folder / "a/b/c").mkdir(parents=True)
    (folder / "a/x").write_text("one file, two names")
    os.link(folder / "a/x", folder / "a/y")
    (folder / "a/out").symlink_to("/etc/passwd")
    (folder / "a/up").symlink_to("../../..")
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    (folder / "data").write_bytes(rng.randbytes(3 * MIB + 17))
    (folder / "empty").touch()
    with (folder / "holes").open("wb") as f:
        f.truncate(50 * MIB)
        for n in range(60):
            f.seek(n * 700_001)
            f.write(rng.randbytes(5000))
    with (folder / "hole").open("wb") as f:
        f.truncate(3 * MIB)
    deep = folder / ("n" * 200)
    for _ in range(10):
        deep.mkdir()
        deep /= "m" * 200
    deep.mkdir()
    (deep / "file").write_text("deep")
    os.link(deep / "file", folder / "to the deep one")
    (folder / "long").symlink_to("t" * 3000)
    (folder / ("e" * 98)).touch()
    (folder / os.fsdecode(b"\xff\n\xe9")).touch()
    (folder / "sticky").mkdir()
    (folder / "sticky").chmod(0o3775)
    os.chown(folder / "a/b", 12345, 0x7FFFFFFE)
    os.chown(folder / "a/x", 7, 8)
    (folder / "a/x").chmod(0o6711)
    os.utime(folder / "a/x", ns=(1_111_111_111_123_456_789, 999_999_999_987_654_321))
    os.utime(folder / "a/b", ns=(1, -5_000_000_001))
    os.setxattr(folder / "data", "trusted.a=b%", b"\0=\nvalue")
    os.setxattr(
        folder / "data", "security.capability", struct.pack("<5I", 1 << 25, 1 << 10, 0, 0, 0)
    )
    acl = _acl((1, 6, -1), (2, 6, 1234), (4, 4, -1), (16, 6, -1), (32, 4, -1))
    os.setxattr(folder / "empty", "system.posix_acl_access", acl)
    os.setxattr(folder / "sticky", "system.posix_acl_default", acl)
    (folder / "sticky/child").touch()
    at = os.open(folder, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"/proc/self/fd/{at}/socket")  # its own name would be too long
    os.close(at)


def _acl(*entries: tuple[int, int, int]) -> bytes:
    lines = [struct.pack("<HHI", tag, rights, who & 0xFFFFFFFF) for tag, rights, who in entries]
    return struct.pack("<I", 2) + b"".join(lines)


def listing(folder: Path, whole: bool = True) -> dict[str, Any]:
    """All that is to be the same.  whole: with the extended attributes."""
    found: dict[str, Any] = {}
    for where, folders, names in os.walk(folder):
        for name in (".", *names, *(d for d in folders if Path(where, d).is_symlink())):
            path = Path(where) / name
            st = path.lstat()
            if stat.S_ISSOCK(st.st_mode):
                continue
            contents: Any = st.st_rdev
            if stat.S_ISREG(st.st_mode):
                contents = path.read_bytes(), st.st_blocks
            elif stat.S_ISLNK(st.st_mode):
                contents = path.readlink()
            rights = oct(st.st_mode), st.st_uid, st.st_gid, st.st_nlink
            xattrs = _xattrs(path) if whole else {}
            found[str(path.relative_to(folder))] = st.st_mtime_ns, rights, contents, xattrs
    return found


def in_seconds(found: dict[str, Any]) -> dict[str, Any]:
    return {name: (one[0] // 10**9, *one[1:]) for name, one in found.items()}


def _xattrs(path: Path) -> dict[str, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {n: os.getxattr(path, n, follow_symlinks=False) for n in names}


def make_older(host: Host) -> None:
    """The pyploop of the host, and so its agent, has no tar from now on."""
    older = host.folder / "older.py"
    older.write_text(_OLDER)
    program = host.folder / "bin/pyploop"
    program.unlink()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {older} "$@"\n')
    program.chmod(0o755)


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two listings are; it prints what differs."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            print(name[-80:], str(before.get(name))[:300], str(after.get(name))[:300])
    return before == after


def test_what_a_tmpfs_has_is_the_same_on_the_target(lab: Lab) -> None:
    where = inside(lab.a, SHM) / "everything"
    where.mkdir()
    fill(where, 13)
    before = listing(where)
    with verify.client(lab) as client:
        events = moved(lab, lab.a)
        client.verify_database()
    assert packings(events) == {"plain"}
    assert (called(lab.a), called(lab.b)) == (set(), set())
    assert same(before, listing(inside(lab.b, SHM) / "everything"))


def test_an_older_target_and_then_an_older_source_have_the_files_too(lab: Lab) -> None:
    """Without extended attributes, which GNU tar takes only when it is asked to.  An older
    source knows no nanoseconds."""
    make_older(lab.a)
    source = lab.b if container.state(lab.b) == "running" else lab.a
    where = inside(source, SHM) / "older"
    where.mkdir()
    fill(where, 14)
    if source is lab.a:
        moved(lab, lab.a)
    before = listing(inside(lab.b, SHM) / "older", whole=False)
    events = moved(lab, lab.b)
    assert packings(events) == {"wrapped"}
    assert (called(lab.a), called(lab.b)) == ({"tar", "gzip"}, set())
    assert same(before, listing(inside(lab.a, SHM) / "older", whole=False))

    before = in_seconds(before)
    events = moved(lab, lab.a)
    assert packings(events) == {"compressed"}
    assert (called(lab.a), called(lab.b)) == ({"tar", "gzip"}, {"tar", "gzip"})
    assert same(before, in_seconds(listing(inside(lab.b, SHM) / "older", whole=False)))
