# SPDX-License-Identifier: Apache-2.0
"""The target's host: its pyploop measures the folder there."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from pyploop.bench.stages import Stage
from pyploop.errors import ConnectError
from pyploop.system import cpu
from pyploop.transport import ssh, ssh_cipher

BESIDE = 120.0
"""Seconds for the stages of a folder there, beside their own time."""
STAGES = 3
"""Stages of a folder."""
LARGEST = 1e15
"""Bytes per second, or seconds, that are a figure."""


class FarHost:
    """Reached by ssh, as a copy would be."""

    def __init__(self, host: str, program: Sequence[str], options: Sequence[str]) -> None:
        self.host, self._ssh, self._options = host, program, options

    def measure(
        self, pyploop: Sequence[str], folder: str, seconds: float
    ) -> tuple[list[Stage], bool]:
        """The stages of the folder, and whether the CPU there has AES instructions.
        ConnectError."""
        words = [*pyploop, "bench", "--target", "--json", f"--seconds={seconds:g}", "--", folder]
        try:
            done = subprocess.run(
                self._command(shlex.join(words)),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=BESIDE + 2 * STAGES * seconds,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise ConnectError(f"cannot measure {folder} on {self.host}: {e}") from e
        if done.returncode:
            said = done.stderr.strip()[-500:].replace("\n", "; ")
            raise ConnectError(
                f"`pyploop bench` on {self.host} ended with {done.returncode}"
                + (f": {said}" if said else ""),
                hint=f"`ssh {self.host} pyploop --version` must print a version",
            )
        try:
            answer = json.loads(done.stdout)
            return [_stage(entry) for entry in answer["stages"]], answer["aes"] is True
        except (ValueError, TypeError, KeyError) as e:
            raise ConnectError(f"pyploop on {self.host} answers something else than figures") from e

    def command(self, aes: bool) -> list[str]:
        """ssh to it, with the cipher that a copy would ask for.  aes: of the CPU there."""
        both = aes and "aes" in cpu.flags()
        choice = ssh_cipher.choose(self._ssh, self._options, self.host, both)
        return self._command(cipher=choice.options)

    def _command(self, *words: str, cipher: Sequence[str] = ()) -> list[str]:
        return [*self._ssh, *self._options, *cipher, *ssh.OPTIONS, "--", self.host, *words]


def _stage(entry: dict[str, Any]) -> Stage:
    """Of another host: ValueError, TypeError or KeyError for anything but a stage."""
    name, unit, note = entry["name"], entry["unit"], entry["note"]
    if unit not in ("bytes/s", "s") or not isinstance(name, str) or not isinstance(note, str):
        raise ValueError(unit)
    values = tuple(float(v) for v in entry["values"])
    if not all(0 <= v < LARGEST for v in values):
        raise ValueError(values)
    return Stage(name[:100], unit, values, note[:200])
