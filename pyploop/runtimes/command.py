# SPDX-License-Identifier: Apache-2.0
"""Any other runtime: each step is a command of the user's, from [container.NAME.commands].

The environment of a command has PYPLOOP_CONTAINER, PYPLOOP_IMAGES (the folder of the
memory images, if there is one) and PYPLOOP_PARENT (that of the pre-dump before).  Exit
status 0 is success.  `status` prints `running`, `suspended`, `stopped` or `absent`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Copied, Facts, Item, State
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.configured import Configured
from pyploop.system.commands import run

_STATES = {
    "running": State(True, True),
    "suspended": State(True, True, True),
    "stopped": State(True),
    "absent": State(False),
}
LIVE = ("suspend", "resume", "dump", "undump", "resume_restored", "kill", "abandon")
STOPPED = ("start", "stop", "abandon")


class CommandRuntime(Configured):
    """One container of one host."""

    name = "command"
    dump_writes = True
    """It is not known what its `dump` command writes."""

    def __init__(self, host: HostConfig, container: str) -> None:
        self.container = container
        self.keep_fds: tuple[int, ...] = ()
        self.lock_dir = host.lock_dir
        self._host = host
        self._config = host.container(container)
        if "status" not in self._config.commands or not (self._config.disks or self._config.trees):
            raise MigrateError(
                VzExitCode.USAGE,
                f"[container.{container}] needs commands.status, and at least one disk or tree",
                path=host.path,
            )

    def _run(
        self, step: str, code: int, images: Path | None = None, parent: Path | None = None
    ) -> str:
        argv = self._config.commands.get(step)
        if argv is None:
            raise MigrateError(
                code,
                f"[container.{self.container}.commands] has no {step}, which has to be run now",
                path=self._host.path,
            )
        extra = {"PYPLOOP_CONTAINER": self.container}
        if images is not None:
            extra["PYPLOOP_IMAGES"] = str(images)
        if parent is not None:
            extra["PYPLOOP_PARENT"] = str(parent)
        return run(
            argv, code, self._host.command_timeout, self.keep_fds, env={**os.environ, **extra}
        )

    def _check_commands(self, live: bool) -> None:
        missing = [s for s in (LIVE if live else STOPPED) if s not in self._config.commands]
        if missing:
            raise MigrateError(
                VzExitCode.USAGE,
                f"[container.{self.container}.commands] lacks {', '.join(missing)}: a migration "
                f"{'with' if live else 'without'} --live needs it",
                path=self._host.path,
            )

    def state(self) -> State:
        output = self._run("status", VzExitCode.NO_CONTAINER).strip()
        if output not in _STATES:
            raise MigrateError(
                VzExitCode.NO_CONTAINER,
                f"the status command of {self.container} printed {output[:40]!r}, which is not one "
                f"of {', '.join(_STATES)}",
            )
        return _STATES[output]

    def check_source(self, live: bool) -> Facts:
        self._check_commands(live)
        self._check_places(used=self.state().running)
        return {}

    def left_behind(self) -> list[str]:
        return []

    def items(self) -> list[Item]:
        return []

    def memory_now(self) -> int:
        return 0

    def suspend(self) -> None:
        self._run("suspend", VzExitCode.DUMP_FAILED)

    def resume(self) -> None:
        self._run("resume", VzExitCode.DUMP_FAILED)

    def why_no_pre_dump(self) -> str:
        return "" if "pre_dump" in self._config.commands else "no pre_dump command is configured"

    def pre_dump(self, images: Path, parent: Path | None) -> float | None:
        self._run("pre_dump", VzExitCode.DUMP_FAILED, images, parent)
        return None

    def dump(self, images: Path, parent: Path | None = None) -> None:
        self._run("dump", VzExitCode.DUMP_FAILED, images, parent)

    def kill(self) -> None:
        if self.state().running:
            self._run("kill", VzExitCode.DUMP_FAILED)

    def stop(self) -> None:
        self._run("stop", VzExitCode.DUMP_FAILED)

    def start(self) -> None:
        self._mount_all()
        if not self.state().running:
            self._run("start", VzExitCode.RESTORE_FAILED)

    def discard(self, remove: bool, copied: Copied | None) -> None:
        self._discard_places(remove, copied)

    def check_target(self, facts: Facts, live: bool) -> None:
        self._check_commands(live)
        if self.state().exists:
            raise MigrateError(
                VzExitCode.EXISTS, f"a container {self.container} exists on this host already"
            )
        self._check_access()

    def destination(self, label: str) -> str:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f'the source sends the file {label[:80]!r}, but a container of the runtime "command" '
            "has only disks and trees",
        )

    def largest(self, label: str) -> int:
        return 0

    def makes(self, facts: Facts) -> list[str]:
        return []

    def placed(self, facts: Facts) -> None:
        pass

    def undump(self, images: Path, commit: Callable[[], None]) -> None:
        self._run("undump", VzExitCode.RESTORE_FAILED, images)
        commit()
        self._run("resume_restored", VzExitCode.RESTORE_FAILED, images)

    def abandon(self) -> None:
        self._run("abandon", VzExitCode.RESTORE_FAILED)
