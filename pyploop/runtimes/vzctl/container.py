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
"""Of a private area, whose container's files lie inside the disk."""
_SPECIAL = {
    5: VzExitCode.NO_KERNEL,
    9: VzExitCode.LOCKED,
    **dict.fromkeys(range(60, 67), VzExitCode.QUOTA),
}
"""vzctl's exit codes that have one of vzmigrate's own, whatever failed."""


class VzctlContainer:
    """One container of one host, as vzctl and its configuration know it."""

    def __init__(self, host: HostConfig, container: str) -> None:
        self._host = host
        self.container = container if CTID.fullmatch(container) else self._resolve(container)
        self.keep_fds: tuple[int, ...] = ()
        self._top = f"{HDD}/root.hds"
        self._policy = host.policy_of(self.container)
        self._simfs: bool | None = None
        """Found by the checks; the source's word, on the target."""
        try:
            self._conf = config_files.load(self.container, Path(host.vz_etc))
            self.lock_dir = self._conf.path("LOCKDIR")
            self._private = Path(self._conf.path("VE_PRIVATE"))
            self._root = self._conf.path("VE_ROOT")
        except PyploopError as e:
            raise MigrateError(VzExitCode.NO_VZ_CONF, str(e)) from e

    def _resolve(self, name: str) -> str:
        if not NAME.fullmatch(name):
            raise MigrateError(VzExitCode.NO_CONTAINER, f"{name!r} is no container's name")
        said = self._ask(
            VzExitCode.NO_CONTAINER, self._host.vzlist, "-o", "ctid", "-H", name
        ).strip()
        if not CTID.fullmatch(said):
            raise MigrateError(
                VzExitCode.NO_CONTAINER, f"no container {name} (vzlist said {said[:40]!r})"
            )
        return said

    # ---- commands

    def _ask(self, code: int, *argv: str) -> str:
        return run(argv, code, self._host.command_timeout)

    def _vzctl(self, code: int, command: str, *words: str, skiplock: bool = True) -> str:
        """MigrateError with vzctl's own reason, or `code`."""
        argv = [self._host.vzctl, *(["--skiplock"] if skiplock else []), command]
        argv += [self.container, *words]
        try:
            status, said = Command(argv, self.keep_fds).wait(self._host.command_timeout)
        except OSError as e:
            raise MigrateError(code, f"{' '.join(argv)}: {e.strerror or e}") from e
        if status:
            raise MigrateError(
                _SPECIAL.get(status, code),
                f"{' '.join(argv)} ended with {status}: {last_words(said)}",
            )
        return said

    def _checkpoint_version(self) -> int | None:
        """What this kernel writes and reads; None: no vzcptcheck here."""
        if shutil.which(self._host.vzcptcheck) is None:
            return None
        said = self._ask(VzExitCode.CHECKPOINT_VERSION, self._host.vzcptcheck, "version").strip()
        if not said.isascii() or not said.isdecimal():
            raise MigrateError(
                VzExitCode.CHECKPOINT_VERSION, f"vzcptcheck version said {said[:40]!r}"
            )
        return int(said)

    def stop(self) -> None:
        # Its disk is still read, and stays mounted for that.
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
        said = self._vzctl(VzExitCode.NO_CONTAINER, "status", skiplock=False)
        line = next((x for x in said.splitlines() if x.startswith("CTID")), said)
        status = parse_status(line, self.container)
        # Its own word: a simfs may have the device number of the folder above.
        return State(status.exists, status.running, status.suspended, status.mounted)

    def _is_simfs(self) -> bool:
        """Its private area is its root, and holds no disk."""
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
        """MigrateError(6) unless the disk, which is not mounted, is a regular file here,
        behind no link.  A container whose private area is its root may have made one."""
        try:
            with beneath.place(str(top), str(self._private)) as at:
                mode = os.lstat(at.name, dir_fd=at.dir_fd).st_mode
        except OSError as e:
            raise MigrateError(VzExitCode.COPY_FAILED, f"the disk {top}: {e.strerror}") from e
        if not stat.S_ISREG(mode):
            raise MigrateError(
                VzExitCode.COPY_FAILED, f"the disk {top} is not a regular file: mount it first"
            )

    def _descriptor(self) -> disk_descriptor.Descriptor:
        path = self._private / HDD / disk_descriptor.NAME
        if not path.exists():
            raise MigrateError(
                VzExitCode.NO_PLOOP,
                f"{path} is not there: only containers on ploop can be migrated",
            )
        found = disk_descriptor.read(str(path))
        for file in found.files:
            self._check_delta(file)
        return found

    def _check_delta(self, file: str) -> None:
        """A descriptor names files by paths, and vzctl and the copy open what these
        lead to.  Of a container in a directory it is the container's own."""
        try:
            with beneath.place(file, str(self._private)) as at:
                mode = os.lstat(at.name, dir_fd=at.dir_fd).st_mode if beneath.exists(at) else 0
        except OSError as e:
            why = f"the disk {file} lies outside the private area, or behind a link ({e.strerror})"
            raise MigrateError(VzExitCode.COPY_FAILED, why) from e
        if mode and not stat.S_ISREG(mode):
            raise MigrateError(VzExitCode.COPY_FAILED, f"the disk {file} is not a regular file")
