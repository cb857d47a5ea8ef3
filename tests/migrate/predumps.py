#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""CRIU's pre-dump on a kernel that does not track memory: a stand-in, from real dumps.

    predumps.py criu CRIU ARGUMENTS…    CRIU says that memory is tracked, and pre-dumps
    predumps.py runc RUNC ARGUMENTS…    checkpoint takes --pre-dump and --parent-path

Each is a real dump with --leave-running, of which a pre-dump keeps the memory alone.
Pages that the parent's images have already, byte for byte, are not kept again, but
marked as the parent's, as CRIU marks those that were not written to: so the chain of
images that comes of it is what a real CRIU restores from.  What runc and CRIU refuse
is refused: a parent that is absolute or not there, or that has no images.  A dump for
post-copy has no pages, so those of the stopped processes are compared.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

PAGE = 4096
PARENT, LAZY, PRESENT = 1, 2, 4
VADDR, FLAGS, PAGES = 1, 4, 5
"""Fields of a pagemap's entry."""
SIZE = struct.Struct("<I")


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 0x80:
            return value, at


def numbers(data: bytes) -> dict[int, int]:
    """A message of nothing but numbers."""
    found, at = {}, 0
    while at < len(data):
        key, at = varint(data, at)
        assert key & 7 == 0, key
        found[key >> 3], at = varint(data, at)
    return found


def varied(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def message(fields: dict[int, int]) -> bytes:
    out = bytearray()
    for key, value in fields.items():
        out += varied(key << 3) + varied(value)
    return SIZE.pack(len(out)) + out


class Pagemap:
    """One process's: magic and head as they are, then entries."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.entries: list[dict[int, int]] = []
        at = 8
        while at < len(data):
            (size,) = SIZE.unpack_from(data, at)
            body = data[at + 4 : at + 4 + size]
            at += 4 + size
            if at == 12 + size:
                self.head, self.pages = data[:at], path.with_name(f"pages-{numbers(body)[1]}.img")
            else:
                self.entries.append(numbers(body))

    def known(self) -> dict[int, bytes | None]:
        """Address -> page; None: the parent has it."""
        found: dict[int, bytes | None] = {}
        at, data = 0, self.pages.read_bytes()
        for e in self.entries:
            for n in range(e[PAGES]):
                address = e[VADDR] + n * PAGE
                if e[FLAGS] & PRESENT:
                    found[address] = data[at : at + PAGE]
                    at += PAGE
                elif e[FLAGS] & PARENT:
                    found[address] = None
        return found

    def lazy(self) -> set[int]:
        """Addresses of pages that can be loaded by page faults."""
        return {
            e[VADDR] + n * PAGE for e in self.entries if e[FLAGS] & LAZY for n in range(e[PAGES])
        }


def whole(folder: Path, name: str) -> dict[int, bytes | None]:
    """All pages that a chain of images has, newest first."""
    if not (folder / name).exists():
        return {}
    found = Pagemap(folder / name).known()
    if None in found.values():
        older = whole(folder / "parent", name)
        found = {a: older[a] if page is None else page for a, page in found.items()}
    return found


def deposit(full: Path, images: Path, parent: Path | None, memory_only: bool) -> None:
    """The images that a dump with a parent would have made, from a full one."""
    if parent is not None:
        (images / "parent").symlink_to(os.path.relpath(parent, images))
    for path in sorted(full.iterdir()):
        if path.name.startswith("pagemap-"):
            _pages(path, images, parent)
        elif path.name == "inventory.img" or not (memory_only or path.name.startswith("pages-")):
            shutil.copy2(path, images / path.name)


def _pages(path: Path, images: Path, parent: Path | None, memory: BinaryIO | None = None) -> None:
    old = whole(parent, path.name) if parent is not None else {}
    source = Pagemap(path)
    lazy = source.lazy()
    entries: list[dict[int, int]] = []
    with (images / source.pages.name).open("wb") as out:
        known = source.known()
        for address in sorted({*known, *lazy}):
            page = known.get(address)
            if page is None and memory is not None:
                memory.seek(address)
                same = address in old and old[address] == memory.read(PAGE)
                flags = PARENT if same else LAZY
            else:
                flags = PARENT if page is not None and old.get(address) == page else PRESENT
            if flags == PRESENT:
                assert page is not None
                out.write(page)
                flags |= LAZY if address in lazy else 0
            last = entries[-1] if entries else None
            if last and last[FLAGS] == flags and address == last[VADDR] + last[PAGES] * PAGE:
                last[PAGES] += 1
            else:
                entries.append({VADDR: address, 2: 0, FLAGS: flags, PAGES: 1})
    (images / path.name).write_bytes(source.head + b"".join(message(e) for e in entries))


def fail(text: str) -> int:
    print(f'level=error msg="{text}"', file=sys.stderr)
    return 1


def option(words: list[str], name: str) -> str:
    """Take it out of the words."""
    if name not in words:
        return ""
    at = words.index(name)
    value = words[at + 1]
    del words[at : at + 2]
    return value


def process(program: str, container: str, pid: int) -> int:
    """The number on this host of a process of the container."""
    said = subprocess.run([program, "state", container], capture_output=True, check=True).stdout
    space = os.readlink(f"/proc/{json.loads(said)['pid']}/ns/pid")
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and os.readlink(f"{entry.path}/ns/pid") == space:
            status = Path(entry.path, "status").read_text()
            (line,) = (x for x in status.splitlines() if x.startswith("NSpid:"))
            if int(line.split()[-1]) == pid:
                return int(entry.name)
    raise ProcessLookupError(pid)


def lazily(program: str, words: list[str], full: Path, images: Path, base: Path) -> int:
    """A dump whose pages are served while it goes on."""
    status = int(option(words, "--status-fd"))
    os.set_inheritable(status, False)
    told, tell = os.pipe()
    os.set_inheritable(tell, True)
    options = ["--status-fd", str(tell), "--image-path", str(full)]
    dump = subprocess.Popen([program, *words[:-1], *options, words[-1]], close_fds=False)
    os.close(tell)
    if os.read(told, 1):
        (images / "parent").symlink_to(os.path.relpath(base, images))
        for path in sorted(full.iterdir()):
            if path.name.startswith("pagemap-shmem-"):
                _pages(path, images, base)
            elif path.name.startswith("pagemap-"):
                pid = process(program, words[-1], int(path.stem.partition("-")[2]))
                with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                    _pages(path, images, base, memory)
            elif not path.name.startswith("pages-"):
                shutil.copy2(path, images / path.name)
        os.write(status, b"\0")
    os.close(status)
    return dump.wait()


def runc(program: str, words: list[str]) -> int:
    parent, images = option(words, "--parent-path"), Path(option(words, "--image-path"))
    memory_only = "--pre-dump" in words
    base: Path | None = None
    if parent:
        base = images / parent
        if parent.startswith("/"):
            return fail("--parent-path must be relative")
        if not base.is_dir():
            return fail(f"invalid --parent-path: stat {base.resolve()}: no such file or directory")
        if not (base / "inventory.img").exists():
            return fail("criu failed: no images in the parent's folder")
    if memory_only:
        words.remove("--pre-dump")
        words.insert(words.index("checkpoint") + 1, "--leave-running")
    full = images.parent / f"{images.name}.full"
    try:
        if "--lazy-pages" in words:
            assert base is not None
            return lazily(program, words, full, images, base.resolve())
        done = subprocess.run(
            [program, *words[:-1], "--image-path", str(full), words[-1]], check=False
        )
        if done.returncode == 0:
            deposit(full, images, base.resolve() if base else None, memory_only)
        return done.returncode
    finally:
        shutil.rmtree(full, ignore_errors=True)


def criu(program: str, words: list[str]) -> int:
    if words[0] == "check":
        print(f"{words[-1]} is supported")
        return 0
    images, parent = Path(option(words, "-D")), option(words, "--prev-images-dir")
    if "--track-mem" in words:
        words.remove("--track-mem")
    full = images.parent / f"{images.name}.full"
    full.mkdir()
    try:
        command = [program, "dump", "--leave-running", "-D", str(full), *words[1:]]
        done = subprocess.run(command, check=False)
        if done.returncode == 0:
            deposit(full, images, (images / parent).resolve() if parent else None, True)
        return done.returncode
    finally:
        shutil.rmtree(full)


def main() -> int:
    which, program, *words = sys.argv[1:]
    return runc(program, words) if which == "runc" else criu(program, words)


if __name__ == "__main__":
    sys.exit(main())
