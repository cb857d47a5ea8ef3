# SPDX-License-Identifier: Apache-2.0
"""The steps of a migration on the target: the files of an OpenVZ container are checked and
put in place, and it is restored.
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
"""End of the name of an action script or a configuration that vzctl must not see yet."""
LARGEST_TEXT = 1 << 20
"""Bytes of CTID.conf, or of a script, at most."""


class TargetSteps(VzctlContainer):
    """The target's part of a Runtime."""

    def __init__(self, host: HostConfig, container: str) -> None:
        super().__init__(host, container)
        self._scripts: list[str] = []
        """Action scripts that are received."""

    def check_target(self, facts: Facts, live: bool) -> None:
        self._simfs = facts.get("simfs") is True
        if not self._simfs and shutil.which(self._host.ploop) is None:
            raise MigrateError(
                VzExitCode.NO_PLOOP,
                f"this host has no {self._host.ploop}: install OpenVZ's ploop, or set ploop in "
                "[vzctl] of migrate.toml",
            )
        if self.state().exists:
            raise MigrateError(
                VzExitCode.EXISTS, f"a container {self.container} exists on this host already"
            )
        for path in (self._private, Path(self._root)):
            with contextlib.suppress(FileNotFoundError):
                if any(not p.name.endswith(volumes.KEPT) for p in path.iterdir()):
                    raise MigrateError(
                        VzExitCode.EXISTS,
                        f"{path}, where the container goes, is not empty",
                        path=str(path),
                    )
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
                f"this host restores dumps up to version {ours}, but the source writes version "
                f"{theirs}: its kernel is newer",
            )

    def _check_addresses(self, facts: Facts) -> None:
        wanted = {conf_check.address_of(str(ip)) for ip in facts.get("ips") or ()}
        if "ipv6" in facts.get("nodeps", ()):
            wanted = {ip for ip in wanted if ":" not in ip}
        if not wanted:
            return
        output = self._ask(VzExitCode.IP_IN_USE, self._host.vzlist, "-a", "-H", "-o", "ip")
        used = wanted & {*map(conf_check.address_of, output.split())}
        if used:
            raise MigrateError(
                VzExitCode.IP_IN_USE,
                f"another container of this host has the address {', '.join(sorted(used))}",
            )

    def _links(self, facts: Facts) -> dict[str, str]:
        """Symbolic links of the private area, of a container on a ploop disk.  Real ones have
        one, .ve.layout, whose text is not a path.  MigrateError(6) for a link that could
        lead elsewhere."""
        found = {} if self._simfs else facts.get("links") or {}
        if not isinstance(found, dict) or len(found) > MOST_FILES:
            raise MigrateError(VzExitCode.COPY_FAILED, "the source sent no table of links")
        for link, text in found.items():
            plain = isinstance(text, str) and not {"/", "\0"} & {*text}
            if not plain or text in ("", ".", ".."):
                raise MigrateError(
                    VzExitCode.COPY_FAILED,
                    f"the source sends the link {link[:80]!r} to {str(text)[:80]!r}, which could "
                    "lead out of the private area",
                )
            if f"{self._top}/".startswith(f"{self._inside(link)}/"):
                raise MigrateError(
                    VzExitCode.COPY_FAILED,
                    f"the source sends the link {link[:80]!r} to the place where the disk goes",
                )
        return found

    def _check_scripts(self, names: str) -> None:
        if not self._policy.action_scripts:
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the container has action scripts ({names}), which would run as root on this "
                "host: write action_scripts = true in [policy] of this host, or move them away on "
                "the source",
            )

    def _inside(self, name: Any) -> str:
        """The name, if it is a path within the private area; else MigrateError(6)."""
        if not isinstance(name, str) or {"", ".", ".."} & {*name.split("/")} or "\0" in name:
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"the source sends {str(name)[:80]!r}, which lies outside the private area",
            )
        if within(name, "scripts"):  # vzctl runs them from there too
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
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"the source sends the file {label[:80]!r}, which no such container has",
        )

    def largest(self, label: str) -> int:
        # A lower delta may be as large as the disk.  The other files are texts.
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
        # The container's own file may name other places than this host's vz.conf.
        try:
            conf = config_files.load(self.container, Path(self._host.vz_etc))
            same = (conf.path("VE_PRIVATE"), conf.path("VE_ROOT"))
        except ParameterError as e:
            raise MigrateError(VzExitCode.BAD_CONFIG, str(e), path=str(path)) from e
        if same != (str(self._private), self._root):
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the source's {self.container}.conf names {same[0]} as VE_PRIVATE and {same[1]} "
                f"as VE_ROOT, but vz.conf of this host has {self._private} and {self._root}: "
                "remove them from that file, or make vz.conf the same",
            )

    def _check_descriptor(self) -> None:
        found = self._descriptor()
        if found.top.path != str(self._private / self._top):
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"the source's disk descriptor names {found.top.path[:80]!r}, which is not the "
                "disk that it sends",
            )

    def check_images(self, images: Path) -> None:
        """Nothing to check: only the kernel can read OpenVZ's dumps."""

    def release(self) -> None:
        if self._is_simfs() and os.path.lexists(self._private / HDD):
            # vzctl would take it for a container on ploop, and open what its descriptor names.
            raise MigrateError(
                VzExitCode.BAD_CONFIG,
                f"the source has sent {self._private / HDD}, which no container in a directory has",
                path=str(self._private / HDD),
            )
        for name in self._scripts:
            path = self._script(name)
            waiting = Path(f"{path}{NOT_YET}")
            waiting.chmod(stat.S_IRWXU)
            os.replace(waiting, path)

    # ---- restore

    def attach(self, disk: Disk) -> list[dict[str, Any]]:
        return []  # vzctl mounts the disk itself

    def mount(self, disk: Disk) -> None:
        # The same mode as on the source: ploop needs it.
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
