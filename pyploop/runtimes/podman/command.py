# SPDX-License-Identifier: Apache-2.0
"""The `podman` command of this host."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.system.commands import Command, last_words

LONGEST = 3600.0
"""Seconds for a command that copies an image."""


class Podman:
    """Runs `podman`, and reads what it prints."""

    def __init__(self, program: str, timeout: float) -> None:
        """timeout: seconds for each command, unless it says something else."""
        self.program, self.timeout = program, timeout
        self.keep_fds: Sequence[int] = ()

    def run(
        self,
        *words: str,
        code: int = VzExitCode.BAD_CONFIG,
        env: Mapping[str, str] | None = None,
        timeout: float = 0.0,
    ) -> str:
        """Its output.  MigrateError(code) when it fails."""
        status, output = self.tried(*words, code=code, env=env, timeout=timeout)
        if status:
            raise MigrateError(
                code,
                f"{self.program} {' '.join(words)} ended with {status}: {last_words(output)}",
            )
        return output

    def tried(
        self,
        *words: str,
        code: int = VzExitCode.BAD_CONFIG,
        env: Mapping[str, str] | None = None,
        timeout: float = 0.0,
    ) -> tuple[int, str]:
        """(exit status, output).  MigrateError(code) when it cannot be run, or is late."""
        argv = [self.program, *words]
        try:
            command = Command(argv, self.keep_fds, env=env)
            return command.wait(timeout or self.timeout)
        except OSError as e:  # TimeoutError is one
            raise MigrateError(code, f"{' '.join(argv)}: {e.strerror or e}") from e

    def says_yes(self, *words: str) -> bool:
        """Of a question such as `network exists`, which exits with 0 or 1.  MigrateError(15) for
        any other status."""
        status, output = self.tried(*words)
        if status not in (0, 1):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{self.program} {' '.join(words)} ended with {status}: {last_words(output)}",
            )
        return status == 0

    def inspected(self, kind: str, name: str) -> dict[str, Any] | None:
        """What `podman KIND inspect NAME` prints; None: there is none of that name."""
        if not self.says_yes(kind, "exists", name):
            return None
        status, output = self.tried(kind, "inspect", name)
        if status:  # it has gone since
            return None
        found = self._parsed(output)
        if isinstance(found, dict):  # of a pod
            return found
        return found[0] if isinstance(found, list) and found else None

    def all_inspected(self) -> list[dict[str, Any]]:
        """The same for all containers, running or not.  MigrateError(15)."""
        ids = self.run("ps", "--all", "--quiet", "--no-trunc").split()
        if not ids:
            return []
        # It fails when one has gone since, and prints the others.
        output = self.tried("container", "inspect", *ids)[1]
        found = self._parsed(output)
        if not isinstance(found, list):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{self.program} container inspect printed no list: {last_words(output)}",
            )
        return found

    def info(self) -> dict[str, Any]:
        """What `podman info` prints, with `version` beside it."""
        found = self._parsed(self.run("info", "--format", "json"))
        if not isinstance(found, dict):
            raise MigrateError(VzExitCode.BAD_CONFIG, f"{self.program} info printed no object")
        return found

    def _parsed(self, output: str) -> Any:
        # Warnings come before it.
        begins = [at for at in (output.find("["), output.find("{")) if at >= 0]
        while begins:
            at = min(begins)
            try:
                return json.loads(output[at:])
            except ValueError:
                begins = [a for a in (output.find(c, at + 1) for c in "[{") if a >= 0]
        return None


def program_path() -> str:
    """PATH of this process, where podman looks for its helpers."""
    return os.environ.get("PATH") or os.defpath
