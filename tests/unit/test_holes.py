# SPDX-License-Identifier: Apache-2.0
"""File systems that do not know their holes, or answer nonsense: everything is
data then, and nothing waits for ever."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from support import MIB, needs, pyploop_cmd, pyploop_env, run

from pyploop.diskcopy import digests
from pyploop.system import file_extents

SIZE = 8 * MIB
HALF = SIZE // 2

Seek = Callable[[int, int, int], int]


def fails(code: int, whence: int = os.SEEK_DATA) -> Seek:
    def seek(fd: int, pos: int, how: int) -> int:
        if how == whence:
            raise OSError(code, os.strerror(code))
        return pos

    return seek


def answers(data: Callable[[int], int], hole: Callable[[int], int]) -> Seek:
    return lambda fd, pos, how: data(pos) if how == os.SEEK_DATA else hole(pos)


NONSENSE = {
    "does not advance": answers(lambda pos: pos, lambda pos: pos),
    "advances by a byte": answers(lambda pos: pos, lambda pos: pos + 1),
    "goes back": answers(lambda pos: 0, lambda pos: pos + MIB),
    "goes back behind the start": answers(lambda pos: -1, lambda pos: pos),
    "has a hole before the data": answers(lambda pos: pos + 4096, lambda pos: 0),
    "has no hole at the end": fails(errno.ENXIO, os.SEEK_HOLE),
    "does not know SEEK_DATA": fails(errno.EINVAL),
    "does not know SEEK_HOLE": fails(errno.EINVAL, os.SEEK_HOLE),
    "does not support it": fails(errno.EOPNOTSUPP),
    "cannot read its tree": fails(errno.EIO),
    "went stale": fails(errno.ESTALE),
}


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """1 MiB of data, a hole, and 1 MiB from the middle on."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB))
    with path.open("r+b") as f:
        f.seek(HALF)
        f.write(os.urandom(MIB))
        f.truncate(SIZE)
        yield f.fileno()


def midway(seek: Seek) -> Seek:
    """Nonsense from the middle of the file on."""
    real = os.lseek
    return lambda fd, pos, how: (seek if pos >= HALF else real)(fd, pos, how)


def test_data_and_holes_are_distinguished(file: int) -> None:
    said: list[str] = []
    assert list(file_extents.data_extents(file, 0, SIZE, said.append)) == [
        (0, MIB),
        (HALF, HALF + MIB),
    ]
    assert list(file_extents.data_extents(file, 4096, HALF + 1)) == [(4096, MIB), (HALF, HALF + 1)]
    assert list(file_extents.data_extents(file, MIB, HALF)) == []
    assert not said


@pytest.mark.parametrize("name", NONSENSE)
def test_a_file_system_that_answers_nonsense_has_data_everywhere(
    name: str, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "lseek", midway(NONSENSE[name]))
        found = list(file_extents.data_extents(file, 0, SIZE, said.append))
    assert found[0] == (0, MIB)
    covered = [pos for pos in range(0, SIZE, 4096) if any(a <= pos < b for a, b in found)]
    wanted = [*range(0, MIB, 4096), *range(HALF, SIZE, 4096)]
    # Nothing that has data is left out; a hole may be taken for data.
    assert set(wanted) <= set(covered)
    assert all(a < b for a, b in found)
    assert all(a[1] <= b[0] for a, b in pairwise(found)), "ascending, disjoint"
    assert len(said) == 1 and "read as data" in said[0]


@pytest.mark.parametrize("name", NONSENSE)
def test_digests_cover_what_may_be_data(
    name: str, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "lseek", NONSENSE[name])
        found = list(digests.data_extents(file, SIZE))
    assert (found[0][0], found[-1][1]) == (0, SIZE)
    assert all(a[1] == b[0] for a, b in pairwise(found))


# ---- the whole command, on a libc that lies

_LYING = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

static off_t lie(int fd, off_t pos, int whence)
{
    const char *how = getenv("LYING_SEEK");

    if (whence != SEEK_DATA && whence != SEEK_HOLE)
        return syscall(SYS_lseek, fd, pos, whence);
    if (*how == 's')
        return pos;
    if (*how == 'b')
        return 0;
    errno = atoi(how);
    return -1;
}
off_t lseek(int fd, off_t pos, int whence) { return lie(fd, pos, whence); }
off_t lseek64(int fd, off_t pos, int whence) { return lie(fd, pos, whence); }
"""


@pytest.fixture(scope="module")
def lying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("cc")
    folder = tmp_path_factory.mktemp("lying")
    source, library = folder / "lying.c", folder / "lying.so"
    source.write_text(_LYING)
    run("cc", "-shared", "-fPIC", "-o", library, source)
    return library


@pytest.mark.parametrize("how", ["stuck", "back", str(errno.EIO), str(errno.EOPNOTSUPP)])
def test_copy_and_info_of_a_file_on_a_file_system_that_lies_about_holes(
    how: str, lying: Path, tmp_path: Path
) -> None:
    image, target = tmp_path / "image", tmp_path / "target"
    image.write_bytes(os.urandom(MIB))
    with image.open("r+b") as f:
        f.truncate(SIZE)
    env = pyploop_env({"LD_PRELOAD": str(lying), "LYING_SEEK": how})

    def pyploop(*words: str) -> str:
        done = subprocess.run(
            [*pyploop_cmd(), *words],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = pyploop("copy", "-s", str(image), "-d", str(target))
    assert target.read_bytes() == image.read_bytes()
    assert said.count("does not show the holes") == 1
    report = json.loads(pyploop("info", "--json", str(image)))
    assert report["data"] == SIZE
    assert sum("does not show the holes" in note for note in report["notes"]) == 1
