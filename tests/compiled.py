# SPDX-License-Identifier: Apache-2.0
"""C that tests compile, once for each content: what the same compiler made of the same
text with the same flags is taken from a cache.  All test processes together run as many
compilers at once as there are CPUs."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CPUS = len(os.sched_getaffinity(0))
KEPT_FOR = 30 * 86400
"""Seconds since the last use."""


class Compiler:
    """Of one cache, which stays for later runs."""

    def __init__(self, cache: Path, cc: str = os.environ.get("CC", "cc")) -> None:
        self._cache = cache
        self._cc = cc
        for old in cache.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process may remove it
                if old.stat().st_mtime < time.time() - KEPT_FOR:
                    old.unlink()

    def objects(self, folder: Path, sources: Iterable[str], flags: Sequence[str]) -> list[Path]:
        """Objects of these files of the folder, in which the compiler runs: the same
        text is known again in another folder."""

        def one(source: str) -> Path:
            return self._made(folder, [*flags, "-c", source], self._text(folder, flags, source))

        with ThreadPoolExecutor(CPUS) as pool:
            return list(pool.map(one, sources))

    def program(self, objects: Sequence[Path], flags: Sequence[str]) -> Path:
        """A program of these objects, with the libraries that csrc/ needs."""
        names = [*(str(o) for o in objects), "-lzstd"]
        return self._made(self._cache, [*flags, *names], "\n".join(names))

    def _text(self, folder: Path, flags: Sequence[str], source: str) -> str:
        with self._turn():
            command = [self._cc, *flags, "-E", source]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.replace(f'"{folder}//"', "")  # gcc names the folder

    def _made(self, folder: Path, words: Sequence[str], text: str) -> Path:
        known = "\0".join([self._version, *words, text])
        target = self._cache / hashlib.sha256(known.encode()).hexdigest()
        if target.exists():
            os.utime(target)
            return target
        unfinished = target.with_suffix(f".{threading.get_native_id()}")
        with self._turn():
            command = [self._cc, *words, "-o", str(unfinished)]
            subprocess.run(command, cwd=folder, check=True)
        return unfinished.rename(target)

    @functools.cached_property
    def _version(self) -> str:
        command = [self._cc, "--version"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """One of CPUS locks, whichever is free."""
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((self._cache / f"cpu{i}").open("w")) for i in range(CPUS)]
            for file in files:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                break
            else:
                fcntl.flock(files[os.getpid() % CPUS], fcntl.LOCK_EX)
            yield
