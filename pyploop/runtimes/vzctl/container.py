# SPDX-License-Identifier: Apache-2.0
"""An OpenVZ container on this host: its configuration, its state and its disk, and what
both hosts do with it.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from pyploop.disks import disk_descriptor
from pyploop.errors import MigrateError, PyploopError, VzExitCode
from pyploop.freeze.vzctl import parse_status
from pyploop.runtimes import Disk, State, Tree, volumes
from pyploop.runtimes.config import CTID, NAME, HostConfig
from pyploop.runtimes.vzctl import config_files
from pyploop.system import beneath, sysblock
from pyploop.system.commands import Command, last_words, run

SCRIPTS = ("start", "stop", "mount", "umount", "premount", "postumount")
HDD = "root.hdd"
DUMP = "Dump"
MOST_FILES = 1000
"""Files of a private area at most.  The container's own files are inside its disk."""
_SPECIAL = {
    5: VzExitCode.NO_KERNEL,
    9: VzExitCode.LOCKED,
    **dict.fromkeys(range(60, 67), VzExitCode.QUOTA),
}
"""vzctl's exit codes that have a code of their own in vzmigrate, whatever failed."""


class VzctlContainer:
    """One container of one host, as vzctl and its configuration know it."""

    def __init__(self, host: HostConfig, container: str) -> None:
        self._host = host
        self.container = container if CTID.fullmatch(container) else self._resolve(container)
        self.keep_fds: tuple[int, ...] = ()
        self._top = f"{HDD}/root.hds"
        self._policy = host.policy_of(self.container)
        self._simfs: bool | None = None
        """Whether it lives in a directory, since the checks.  On the target as the source
        says."""
        try:
            self._conf = config_files.load(self.container, Path(host.vz_etc))
            self.lock_dir = self._conf.path("LOCKDIR")
            self._private = Path(self._conf.path("VE_PRIVATE"))
            self._root = self._conf.path("VE_ROOT")
        except PyploopError as e:
            raise MigrateError(VzExitCode.NO_VZ_CONF, str(e), path=e.path) from e

    def _resolve(self, name: str) -> str:
        """The number of the container with this name."""
        if not NAME.fullmatch(name):
            raise MigrateError(VzExitCode.NO_CONTAINER, f"{name!r} cannot be a container's name")
        output = self._ask(
            VzExitCode.NO_CONTAINER, self._host.vzlist, "-o", "ctid", "-H", name
        ).strip()
        if not CTID.fullmatch(output):
            raise MigrateError(
                VzExitCode.NO_CONTAINER,
                f"vzlist knows no container {name} on this host: it printed {output[:40]!r}",
            )
        return output

    # ---- commands

    def _ask(self, code: int, *argv: str) -> str:
        return run(argv, code, self._host.command_timeout)

    def _vzctl(self, code: int, command: str, *words: str, skiplock: bool = True) -> str:
        """vzctl's output.  MigrateError with the code for its exit code, or with `code`."""
        argv = [self._host.vzctl, *(["--skiplock"] if skiplock else []), command]
        argv += [self.container, *words]
        try:
            status, output = Command(argv, self.keep_fds).wait(self._host.command_timeout)
        except OSError as e:  # TimeoutError is one
            raise MigrateError(code, f"{' '.join(argv)}: {e.strerror or e}") from e
        if status:
            raise MigrateError(
                _SPECIAL.get(status, code),
                f"{' '.join(argv)} ended with {status}: {last_words(output)}",
            )
        return output

    def _checkpoint_version(self) -> int | None:
        """The version of the dumps that this kernel writes and reads.  None: this host has no
        vzcptcheck."""
        if shutil.which(self._host.vzcptcheck) is None:
            return None
        code = VzExitCode.CHECKPOINT_VERSION
        output = self._ask(code, self._host.vzcptcheck, "version").strip()
        if not output.isascii() or not output.isdecimal():
            raise MigrateError(
                code, f"{self._host.vzcptcheck} version printed {output[:40]!r}, not a number"
            )
        return int(output)

    def stop(self) -> None:
        # The disk stays mounted: its device is still read.
        if self.state().running:
            self._vzctl(VzExitCode.DUMP_FAILED, "stop", "--skip-umount")

    def start(self) -> None:
        if not self.state().running:
            self._vzctl(VzExitCode.RESTORE_FAILED, "start")

    def kill(self) -> None:
        state = self.state()
        if state.running:
            self._vzctl(VzExitCode.DUMP_FAILED, "chkpnt", "--kill")
        self._unmount()

    def _unmount(self) -> None:
        if self.state().mounted:
            self._vzctl(VzExitCode.DUMP_FAILED, "umount")

    # ---- what there is

    def state(self) -> State:
        output = self._vzctl(VzExitCode.NO_CONTAINER, "status", skiplock=False)
        line = next((x for x in output.splitlines() if x.startswith("CTID")), output)
        status = parse_status(line, self.container)
        # vzctl knows whether it is mounted.  Device numbers do not tell: a simfs may have
        # that of the folder above.
        return State(status.exists, status.running, status.suspended, status.mounted)

    def _is_simfs(self) -> bool:
        """Whether its private area is its root, and has no disk."""
        if self._simfs is not None:
            return self._simfs
        return not (self._private / HDD).exists() and self._private.is_dir()

    def _conf_file(self) -> Path:
        return Path(self._host.vz_etc) / "conf" / f"{self.container}.conf"

    def _script(self, name: str) -> Path:
        return Path(self._host.vz_etc) / "conf" / f"{self.container}.{name}"

    def trees(self) -> list[Tree]:
        return [Tree(str(self._private))] if self._is_simfs() else []

    def disks(self, source: bool) -> list[Disk]:
        if self._is_simfs():
            return []
        opened = ""
        if source:
            top = Path(self._descriptor().top.path)
            self._top = str(top.relative_to(self._private))
            opened = str(top)
            if device := volumes.device_of(self._root):
                st = os.stat(device).st_rdev
                opened = f"/dev/{sysblock.find((os.major(st), os.minor(st))).disk}"
            else:
                self._check_plain(top)
        return [Disk(str(self._private / self._top), "", "", "", opened)]

    def _check_plain(self, top: Path) -> None:
        """MigrateError(6) unless the disk, which is not mounted, is a regular file in the
        private area, and no link leads to it.  A container whose private area is its root
        could have made one."""
        try:
            with beneath.place(str(top), str(self._private)) as at:
                mode = os.lstat(at.name, dir_fd=at.dir_fd).st_mode
        except OSError as e:
            raise MigrateError(
                VzExitCode.COPY_FAILED, f"cannot use the disk {top}: {e.strerror}", path=str(top)
            ) from e
        if not stat.S_ISREG(mode):
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"the disk {top} is not a regular file: mount the container first (vzctl mount)",
                path=str(top),
            )

    def _descriptor(self) -> disk_descriptor.Descriptor:
        path = self._private / HDD / disk_descriptor.NAME
        if not path.exists():
            raise MigrateError(
                VzExitCode.NO_PLOOP,
                f"{path} does not exist: only a container on a ploop disk or in a directory can be "
                "migrated",
                path=str(path),
            )
        found = disk_descriptor.read(str(path))
        for file in found.files:
            self._check_delta(file)
        return found

    def _check_delta(self, file: str) -> None:
        """MigrateError(6) unless the delta is a regular file in the private area.  A descriptor
        names deltas by their paths, and vzctl and the copy open what these lead to.  A
        container in a directory could have written the descriptor."""
        try:
            with beneath.place(file, str(self._private)) as at:
                mode = os.lstat(at.name, dir_fd=at.dir_fd).st_mode if beneath.exists(at) else 0
        except OSError as e:
            why = f"the disk {file} lies outside the private area, or behind a link ({e.strerror})"
            raise MigrateError(VzExitCode.COPY_FAILED, why, path=file) from e
        if mode and not stat.S_ISREG(mode):
            raise MigrateError(
                VzExitCode.COPY_FAILED, f"the disk {file} is not a regular file", path=file
            )
