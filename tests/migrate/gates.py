# SPDX-License-Identifier: Apache-2.0
"""Places in a migration where a test can stop it: before and after runc's
checkpoint (or pre-dump), restore and delete.  A script takes runc's place on the host."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lab.hosts import Host
from support import wait_until

STEPS = ("checkpoint", "restore", "delete")

# Nobody waits for ever: a test that has ended removes the gate, and after 60 s it opens.
_SCRIPT = """#!/bin/sh
gate() {{
  [ -e {folder}/$1 ] || return 0
  : >{folder}/$1.reached
  i=0
  while [ -e {folder}/$1 ] && [ $i -lt 6000 ]; do sleep 0.01; i=$((i + 1)); done
}}
for step; do
  case $step in
  checkpoint|restore|delete)
    case "$*" in *--pre-dump*) step=pre-dump ;; esac
    [ ! -e {folder}/$step-fails ] || {{ echo "$step was made to fail" >&2; exit 1; }}
    gate $step-before
    {runc} "$@"
    code=$?
    gate $step-after
    exit $code ;;
  esac
done
exec {runc} "$@"
"""


class Gates:
    """Of one host."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._folder = folder
        script = host.folder / "bin" / "runc"
        runc: str | Path | None = shutil.which("runc")
        if script.exists():  # another one has its place already
            runc = script.rename(script.with_name("runc-behind"))
        script.write_text(_SCRIPT.format(folder=folder, runc=runc))
        script.chmod(0o755)

    def close_gate(self, place: str) -> None:
        """place: a step, -before or -after."""
        (self._folder / place).touch()

    def reached(self, place: str) -> bool:
        return (self._folder / f"{place}.reached").exists()

    def wait(self, place: str) -> None:
        wait_until(lambda: self.reached(place), f"{place} is reached", 40)

    def open_gate(self, place: str) -> None:
        (self._folder / place).unlink(missing_ok=True)
        (self._folder / f"{place}.reached").unlink(missing_ok=True)


@contextlib.contextmanager
def gates(host: Host) -> Iterator[Gates]:
    folder = host.folder / "gates"
    folder.mkdir()
    try:
        yield Gates(host, folder)
    finally:
        script = host.folder / "bin" / "runc"
        script.unlink(missing_ok=True)
        if script.with_name("runc-behind").exists():
            script.with_name("runc-behind").rename(script)
        shutil.rmtree(folder)
