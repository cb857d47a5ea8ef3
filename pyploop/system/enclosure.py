# SPDX-License-Identifier: Apache-2.0
"""Runs a program in a small root of its own: one directory tree, read-only, as
/tree, and the programs and libraries that it needs.

    enclosure.py TREE PATH… -- PROGRAM NAME ARGUMENTS…    NAME: its argv[0]

rsync opens files by their paths.  A container can replace a folder with a link while
rsync runs.  As root, rsync would then read what the link names on the host; in this root
it names nothing.  This file is run by its path, without the package, so it starts quickly.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import sys

_CLONE_NEWNS = 0x20000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 4096, 16384, 1 << 18
ROOT = "/dev"
"""The new root is mounted here, in a mount namespace of our own.  Every host has this
folder, and nothing in it is needed."""
TREE = "/tree"
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    words = [w if w is None else os.fsencode(w) for w in (source, target, kind)]
    result = _libc.mount(*words, ctypes.c_ulong(flags), data and os.fsencode(data))
    _check(result, f"mount {target}")


def _bind(fd: int, path: str, flags: int) -> None:
    """Bind-mount an open file or folder read-only, at a path below the current folder."""
    _mount(f"/proc/self/fd/{fd}", path, None, _MS_BIND | (flags & _MS_REC), None)
    remount = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    _mount("none", path, None, remount | (flags & _MS_NOEXEC), None)


def _show(path: str, fd: int) -> None:
    """Bind-mount an open file or folder at the same path in the new root."""
    here = path.lstrip("/")
    os.makedirs(os.path.dirname(here) or ".", exist_ok=True)
    if os.path.lexists(here):
        return
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.mkdir(here)
    else:
        os.close(os.open(here, os.O_WRONLY | os.O_CREAT, 0o755))
    _bind(fd, here, 0)


def enclose(tree: str, paths: list[str]) -> None:
    """Move this process into the new root.  OSError."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, None)
    # All is opened before the new root may hide it.
    top = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    opened, links = [], []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if os.path.islink(path) and os.path.isdir(path):  # /bin -> usr/bin
                links.append((path, os.readlink(path)))
            else:
                opened.append((path, os.open(path, os.O_PATH)))
    _mount("tmpfs", ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=4m")
    os.chdir(ROOT)
    for path, text in links:
        os.makedirs(os.path.dirname(path).lstrip("/") or ".", exist_ok=True)
        os.symlink(text, path.lstrip("/"))
    for path, fd in opened:
        _show(path, fd)
    os.mkdir(TREE.lstrip("/"))
    _bind(top, TREE.lstrip("/"), _MS_REC | _MS_NOEXEC)
    os.chroot(".")
    os.chdir("/")


def main() -> None:
    tree, *words = sys.argv[1:]
    split = words.index("--")
    enclose(tree, words[:split])
    program = words[split + 1]
    try:
        os.execv(program, words[split + 2 :])
    except OSError as e:  # also when its interpreter is missing
        raise OSError(e.errno, e.strerror, f"run {program}") from e


if __name__ == "__main__":
    try:
        main()
    except OSError as e:
        why = f"{e.filename}: {e.strerror}" if e.filename else str(e.strerror)
        sys.stderr.write(f"cannot keep a program within {sys.argv[1]}: {why}\n")
        os._exit(126)
