# SPDX-License-Identifier: Apache-2.0
"""Commands of a migration at which a test can stop it, or let it go wrong: runc's
checkpoint (or pre-dump), restore and delete, CRIU's checks, the container's link.
Scripts take the place of the programs on the host, and mostly call them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from lab.hosts import SLOWNESS, Host
from support import wait_until

# Nobody waits for ever: a test that has ended removes the gate, and after 60 s it opens.
_SCRIPT = """#!/bin/sh
here() {{
  if [ -e {folder}/$1 ]; then
    : >{folder}/$1.reached
    i=0
    while [ -e {folder}/$1 ] && [ $i -lt 6000 ]; do sleep 0.01; i=$((i + 1)); done
  fi
  [ -e {folder}/$1.fault ] || return 0
  read -r action number <{folder}/$1.fault
  case ",$number," in *",0,"* | *",$count,"*) ;; *) return 0 ;; esac
  echo "$step" >>{folder}/happened
  case $action in
  hang) exec sleep 60 ;;
  die) kill -9 $$ ;;
  esac
  echo "$step was made to fail" >&2
  exit $action
}}
case " $* " in
{steps}
*) exec {program} "$@" ;;
esac
echo "$step" >>{folder}/steps
count=$(grep -cxF -- "$step" {folder}/steps)
here $step-before
# Who starts it must have it itself, and no shell around it.
[ $step != criu-lazy-pages ] || exec env LD_PRELOAD={folder}.so HOLD={folder}/memory {program} "$@"
# runc takes this very process for CRIU.
[ $step != criu ] || exec {program} "$@"
{program} "$@"
code=$?
here $step-after
exit $code
"""
_HOLD = r"""
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

ssize_t pread64(int fd, void *to, size_t n, off_t at)
{
	while (!access(getenv("HOLD"), F_OK))
		usleep(2000);
	return syscall(SYS_pread64, fd, to, n, at);
}

ssize_t recv(int fd, void *to, size_t n, int flags)
{
	while (!access(getenv("HOLD"), F_OK))
		usleep(2000);
	return recvfrom(fd, to, n, flags, NULL, NULL);
}

ssize_t pread(int fd, void *to, size_t n, off_t at)
{
	return pread64(fd, to, n, at);
}
"""
"""Of the daemon that loads memory: it reads nothing while the gate `memory` is closed.  (A
signal that stops it would end CRIU's when it goes on.)"""
STEPS = {
    "runc": {
        "* --help *": "help",
        "* --pre-dump *": "pre-dump",
        "* checkpoint *": "checkpoint",
        "* restore *": "restore",
        "* delete *": "delete",
    },
    "criu": {
        "* --version *": "criu-version",
        "* check *": "criu-check",
        "* dump *": "criu-dump",
        "* swrk 3 *": "criu",
        "* lazy-pages *": "criu-lazy-pages",
    },
    "ip": {"* ct0 down *": "link-down", "* ct0 up *": "link-up"},
}
"""Program -> pattern of its words -> the step's name."""


class Gates:
    """Of one host."""

    def __init__(
        self, host: Host, folder: Path, programs: Mapping[str, Mapping[str, str]] = STEPS
    ) -> None:
        self._programs = programs
        self._folder, self._bin = folder, host.folder / "bin"
        words = ["gcc", "-shared", "-fPIC", "-x", "c", "-o", f"{folder}.so", "-"]
        subprocess.run(words, input=_HOLD, text=True, check=True)
        for name, patterns in programs.items():
            script, program = self._bin / name, shutil.which(name)
            if os.path.lexists(script):  # another one has its place already
                program = str(script.rename(self._bin / f"{name}-behind"))
            steps = "\n".join(f'"{p}") step={s} ;;' for p, s in patterns.items())
            steps = steps.replace('"* ', '*" ').replace(' *"', ' "*')
            script.write_text(_SCRIPT.format(folder=folder, program=program, steps=steps))
            script.chmod(0o755)

    # ---- gates; place: a step, -before or -after

    def close_gate(self, place: str) -> None:
        (self._folder / place).touch()

    def reached(self, place: str) -> bool:
        return (self._folder / f"{place}.reached").exists()

    def wait(self, place: str) -> None:
        wait_until(lambda: self.reached(place), f"{place} is reached", 40 * SLOWNESS)

    def open_gate(self, place: str) -> None:
        (self._folder / place).unlink(missing_ok=True)
        (self._folder / f"{place}.reached").unlink(missing_ok=True)

    # ---- faults

    def fail(
        self, step: str, action: str | int, when: str = "before", number: int | str = 0
    ) -> None:
        """action: an exit code, "hang", or "die" (SIGKILL); number: of the step's
        calls since `mend`, 0: each; several with commas between them."""
        (self._folder / f"{step}-{when}.fault").write_text(f"{action} {number}\n")

    def happened(self) -> list[str]:
        """Steps that went wrong, since `mend`."""
        path = self._folder / "happened"
        return path.read_text().split() if path.exists() else []

    def calls(self, step: str) -> int:
        """How often it was called since `mend`."""
        path = self._folder / "steps"
        return path.read_text().split().count(step) if path.exists() else 0

    def mend(self) -> None:
        """No gates, no faults, no calls seen."""
        for path in self._folder.iterdir():
            path.unlink()

    def close(self) -> None:
        for name in self._programs:
            (self._bin / name).unlink(missing_ok=True)
            if os.path.lexists(self._bin / f"{name}-behind"):
                (self._bin / f"{name}-behind").rename(self._bin / name)


@contextlib.contextmanager
def gates(host: Host, programs: Mapping[str, Mapping[str, str]] = STEPS) -> Iterator[Gates]:
    folder = host.folder / "gates"
    folder.mkdir()
    made = Gates(host, folder, programs)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)
        Path(f"{folder}.so").unlink()
