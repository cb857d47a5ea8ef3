# SPDX-License-Identifier: Apache-2.0
"""What is done with an OpenVZ container on the target: its files are checked and put in
place, and it is restored.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, ParameterError, VzExitCode
from pyploop.runtimes import LARGEST_FILE, Disk, Facts, volumes
from pyploop.runtimes.config import HostConfig, within
from pyploop.runtimes.vzctl import conf_check, config_files
from pyploop.runtimes.vzctl.container import DUMP, HDD, MOST_FILES, SCRIPTS, VzctlContainer
from pyploop.system import beneath

NOT_YET = ".pyploop-not-yet"
"""End of the name of an action script, or a configuration, which vzctl must not see
yet."""
LARGEST_TEXT = 1 << 20
"""Bytes of CTID.conf, and of a script."""


class TargetSteps(VzctlContainer):
    """The target's part of a Runtime."""

    def __init__(self, host: HostConfig, container: str) -> None:
        super().__init__(host, container)
        self._scripts: list[str] = []
        """Action scripts that have come."""

    def check_target(self, facts: Facts, live: bool) -> None:
        self._simfs = facts.get("simfs") is True
        if not self._simfs and shutil.which(self._host.ploop) is None:
            raise MigrateError(VzExitCode.NO_PLOOP, f"no {self._host.ploop} here")
        if self.state().exists:
            raise MigrateError(VzExitCode.EXISTS, f"container {self.container} exists")
        for path in (self._private, Path(self._root)):
            with contextlib.suppress(FileNotFoundError):
                if any(not p.name.endswith(volumes.KEPT) for p in path.iterdir()):
                    raise MigrateError(VzExitCode.EXISTS, f"{path} is not empty")
        if scripts := facts.get("scripts"):
            self._check_scripts(str(scripts)[:80])
        if not self._simfs:
            self._top = self._inside(facts.get("top"))
        self._links(facts)
        if self._policy.private:
            for tree in self.trees():
                volumes.check_private(tree.path)
        self._check_addresses(facts)
        theirs, ours = facts.get("checkpoint"), self._checkpoint_version() if live else None
        if ours is not None and isinstance(theirs, int) and ours < theirs:
            raise MigrateError(
                VzExitCode.CHECKPOINT_VERSION,
                f"checkpoint version {ours} here, {theirs} at the source",
            )

    def _check_addresses(self, facts: Facts) -> None:
        wanted = {conf_check.address_of(str(ip)) for ip in facts.get("ips") or ()}
        if "ipv6" in facts.get("nodeps", ()):
            wanted = {ip for ip in wanted if ":" not in ip}
        if not wanted:
            return
        said = self._ask(VzExitCode.IP_IN_USE, self._host.vzlist, "-a", "-H", "-o", "ip")
        used = wanted & {*map(conf_check.address_of, said.split())}
        if used:
            raise MigrateError(VzExitCode.IP_IN_USE, f"{', '.join(sorted(used))} is in use here")

    def _links(self, facts: Facts) -> dict[str, str]:
        """Links of the private area of a ploop container, which has one: .ve.layout,
        whose text is no path.  MigrateError(6) for any other."""
        found = {} if self._simfs else facts.get("links") or {}
        if not isinstance(found, dict) or len(found) > MOST_FILES:
            raise MigrateError(VzExitCode.COPY_FAILED, "the source told no table of links")
        for link, text in found.items():
            plain = isinstance(text, str) and not {"/", "\0"} & {*text}
            if not plain or text in ("", ".", ".."):
                raise MigrateError(
                    VzExitCode.COPY_FAILED,
                    f"{link[:80]!r}: a link to {str(text)[:80]!r} is not made here",
                )
            if f"{self._top}/".startswith(f"{self._inside(link)}/"):
                raise MigrateError(
                    VzExitCode.COPY_FAILED, f"{link[:80]!r} is where the disk comes to"
                )
        return found

    def _check_scripts(self, names: str) -> None:
        if not self._policy.action_scripts:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the container has action scripts ({names}), which would run as root here: write "
                "action_scripts = true in [policy] of this host, or move them away at the source",
            )

    def _inside(self, name: Any) -> str:
        """A path within the private area; MigrateError for any other."""
        if not isinstance(name, str) or {"", ".", ".."} & {*name.split("/")} or "\0" in name:
            raise MigrateError(
                VzExitCode.COPY_FAILED, f"{str(name)[:80]!r} lies outside the private area"
            )
        if within(name, "scripts"):  # by whatever way it comes
            self._check_scripts(name[:80])
        return name

    # ---- files

    def destination(self, label: str) -> str:
        kind, _, rest = label.partition(":")
        if label == "conf":
            return f"{self._conf_file()}{NOT_YET}"
        if kind == "script" and rest in SCRIPTS:
            self._check_scripts(rest)
            self._scripts.append(rest)
            return f"{self._script(rest)}{NOT_YET}"
        if kind == "private" and not self._is_simfs() and self._inside(rest) != self._top:
            return str(self._private / rest)
        raise MigrateError(VzExitCode.COPY_FAILED, f"no item {label[:80]!r} belongs to a container")

    def largest(self, label: str) -> int:
        # A lower delta is as large as the disk; what vzctl reads as text is not.
        return LARGEST_FILE if label.startswith("private:") else LARGEST_TEXT

    def makes(self, facts: Facts) -> list[str]:
        made = [str(self._private / link) for link in self._links(facts)]
        made.append(str(self._conf_file()))
        return made + [str(self._script(name)) for name in self._scripts]

    def root_of(self, path: str) -> str:
        return str(self._private) if within(path, str(self._private)) else ""

    def folders(self) -> list[str]:
        return [str(self._private), self._root]

    def placed(self, facts: Facts) -> None:
        for link, text in self._links(facts).items():
            with beneath.place(str(self._private / link), str(self._private)) as at:
                os.symlink(text, at.name, dir_fd=at.dir_fd)
        path = self._conf_file()
        ips = map(str, facts.get("ips") or ())
        conf_check.check(Path(f"{path}{NOT_YET}"), self.container, self._policy, {*ips})
        os.replace(f"{path}{NOT_YET}", path)
        if not self._is_simfs():
            self._check_descriptor()
        # Its own file may name other places than this host's vz.conf does.
        try:
            conf = config_files.load(self.container, Path(self._host.vz_etc))
            same = (conf.path("VE_PRIVATE"), conf.path("VE_ROOT"))
        except ParameterError as e:
            raise MigrateError(VzExitCode.BAD_CONFIG, str(e)) from e
        if same != (str(self._private), self._root):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{self.container}.conf names {same[0]} and {same[1]}, this host's vz.conf "
                f"{self._private} and {self._root}",
            )

    def _check_descriptor(self) -> None:
        found = self._descriptor()
        if found.top.path != str(self._private / self._top):
            raise MigrateError(
                VzExitCode.COPY_FAILED, f"{found.top.path[:80]!r} is not the disk that comes"
            )

    def check_images(self, images: Path) -> None:
        """OpenVZ's are the kernel's own, and nothing outside it can read them."""

    def release(self) -> None:
        if self._is_simfs() and os.path.lexists(self._private / HDD):
            # vzctl would take it for one on ploop, and open what its descriptor names.
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"{self._private / HDD} has come, which no container in a directory has",
            )
        for name in self._scripts:
            path = self._script(name)
            waiting = Path(f"{path}{NOT_YET}")
            waiting.chmod(stat.S_IRWXU)
            os.replace(waiting, path)

    # ---- restore

    def attach(self, disk: Disk) -> list[dict[str, Any]]:
        return []  # vzctl mounts it by itself

    def mount(self, disk: Disk) -> None:
        # As the source's: ploop opens it by this mode.
        Path(disk.image).chmod(stat.S_IRUSR | stat.S_IWUSR)

    def undump(self, images: Path, commit: Callable[[], None]) -> None:
        file = str(images / DUMP)
        words = ("--undump", "--dumpfile", file, "--skip_arpdetect")
        self._vzctl(VzExitCode.RESTORE_FAILED, "restore", *words, skiplock=False)
        commit()
        self._vzctl(VzExitCode.RESTORE_FAILED, "restore", "--resume", skiplock=False)

    def abandon(self) -> None:
        if self.state().running:
            self._vzctl(VzExitCode.RESTORE_FAILED, "restore", "--kill")
        self._unmount()
