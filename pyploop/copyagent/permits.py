# SPDX-License-Identifier: Apache-2.0
"""What an agent may be asked for: everything that its user may do, or less, as the command of
an ssh key says (docs/internals/trust.md)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyploop.errors import ParameterError

_STOPS = ("stops", "before_thaw", "throttle_rate", "mounts")
"""Options that stop something.  `mounts`: any file system, and not those of the source."""


@dataclass(frozen=True)
class Permits:
    """None: there is no limit."""

    read: Sequence[str] | None = None
    """Sources, and folders in which they lie."""
    write: Sequence[str] | None = None
    """Folders for targets, and devices (--to-device)."""
    update: bool = True
    """It may replace what it finds in these folders (--update)."""
    stops: bool = True
    """It may stop containers and any file system, slow them down, and run commands."""

    @classmethod
    def of(
        cls, read: Sequence[str], write: Sequence[str], stops: bool, update: bool = False
    ) -> Permits:
        """By the options of the command.  Without any there are no limits."""
        if not (read or write or update or stops):
            return cls()
        return cls(read, write, update=update, stops=stops)

    def check_source(self, path: str, options: dict[str, Any]) -> None:
        """ParameterError unless it may be copied with these options."""
        if self.read is not None:
            _check(path, os.path.realpath(path), self.read, "read", "--read")
        asked = any(options.get(name) for name in _STOPS)
        if asked and not self.stops:
            raise ParameterError(
                "this host's copy-agent may not stop anything and runs no commands; nothing was "
                "copied",
                hint="add --stops to the command of the ssh key, or copy without -F, --freeze, "
                "--mount, --before-thaw and --throttle",
            )

    def check_target(self, path: str, options: dict[str, Any]) -> None:
        """ParameterError unless it may be written with these options."""
        if options.get("update") and not self.update:
            raise ParameterError(
                f"this host's copy-agent writes new files only, and replaces none; {path} is as it "
                "was",
                path=path,
                hint="add --update to the command of the ssh key, or copy to a new name",
            )
        if self.write is not None:
            # A new file is never made through a link, but a device may be behind one.
            name = path if options.get("to_device") else os.path.dirname(path) or "."
            _check(path, os.path.realpath(name), self.write, "write", "--write")


def _check(path: str, real: str, allowed: Sequence[str], verb: str, option: str) -> None:
    for one in allowed:
        top = os.path.realpath(one)
        if real == top or real.startswith(top.rstrip("/") + "/"):
            return
    raise ParameterError(
        f"this host's copy-agent may not {verb} {path}; nothing was copied",
        path=path,
        hint=f"the command of the ssh key names what it may {verb} ({option})",
    )
