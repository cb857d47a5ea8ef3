# SPDX-License-Identifier: Apache-2.0
"""The steps of a migration on the source: an OpenVZ container is checked, suspended and
dumped, and in the end destroyed or renamed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import Copied, Disk, Facts, Item, copied
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.vzctl.container import DUMP, MOST_FILES, SCRIPTS, VzctlContainer
from pyploop.system import mount_table
from pyploop.system.tree_walk import walk


class SourceSteps(VzctlContainer):
    """The source's part of a Runtime."""

    def __init__(self, host: HostConfig, container: str) -> None:
        super().__init__(host, container)
        self._left: list[str] = []
        """Lines for `left_behind`."""

    def check_source(self, live: bool) -> Facts:
        # Decided only once: a container whose private area is its root can change it.
        self._simfs = self._is_simfs()
        self._check_root()
        self._left = [
            f"{e.source} ({e.root}) is mounted on {e.point}, within the container, and is not "
            "migrated: the container's mount script has to mount it on the target too"
            for e in mount_table.below(self._root)
        ]
        facts: Facts = {
            "simfs": self._is_simfs(),
            "scripts": [s for s in SCRIPTS if self._script(s).exists()],
            "ips": (self._conf.get("IP_ADDRESS") or "").split(),
            "checkpoint": self._checkpoint_version() if live else None,
        }
        if self._is_simfs():
            return facts
        top = self.disks(source=True)[0].image
        links = {}
        for path in self._files():
            if path.is_symlink():
                links[str(path.relative_to(self._private))] = os.readlink(path)
        return facts | {"top": str(Path(top).relative_to(self._private)), "links": links}

    def _check_root(self) -> None:
        """MigrateError(15) unless VE_ROOT shows the container's private area, as far as the
        mount table tells."""
        mounted = mount_table.at(self._root)
        if mounted is None:
            if (state := self.state()).running or state.mounted:
                raise MigrateError(
                    VzExitCode.BAD_CONFIG,
                    f"vzctl says that the container is mounted, but nothing is mounted on "
                    f"{self._root}: another mount hides it, or VE_ROOT was changed since the start",
                    path=self._root,
                )
            return
        if self._is_simfs():
            copied.check_simfs(self._root, str(self._private), mounted)
        else:
            copied.check_ploop(self._root, self._descriptor().top.path, mounted)

    def left_behind(self) -> list[str]:
        left, self._left = self._left, []
        return left

    def copied(self, disks: list[Disk]) -> Copied:
        self._check_root()
        for tree in self.trees():
            copied.check_tree(tree)
        paths = [str(self._private), *(d.image for d in disks)]
        return {path: copied.identity(path) for path in paths}

    def _files(self) -> Iterator[Path]:
        """Files and links of the private area, without the top delta, which is copied as a
        disk.  None for a container in a directory, which is copied as a tree."""
        if self._is_simfs():
            return
        found: list[Path] = []
        with contextlib.suppress(FileNotFoundError):
            for names, _, entries in walk(str(self._private)):
                found += [self._private.joinpath(*names, e.name) for e in entries]
                if len(found) > MOST_FILES:
                    raise MigrateError(
                        VzExitCode.COPY_FAILED,
                        f"{self._private} has more than {MOST_FILES} files, too many for a "
                        "container on a ploop disk",
                        path=str(self._private),
                    )
        yield from (path for path in sorted(found) if path != self._private / self._top)

    def items(self) -> list[Item]:
        result = [Item("conf", str(self._conf_file()))]
        for script in SCRIPTS:
            if (path := self._script(script)).exists():
                result.append(Item(f"script:{script}", str(path)))
        for path in self._files():
            if path.is_file() and not path.is_symlink():
                label = f"private:{path.relative_to(self._private)}"
                result.append(Item(label, str(path)))
        return result

    # ---- suspend and dump

    def memory_now(self) -> int:
        return 0

    def suspend(self) -> None:
        self._vzctl(VzExitCode.DUMP_FAILED, "chkpnt", "--suspend")

    def resume(self) -> None:
        try:
            self._vzctl(VzExitCode.DUMP_FAILED, "chkpnt", "--resume")
        except MigrateError:
            # vzctl refuses to resume a container that is not suspended.
            state = self.state()
            if not state.running or state.suspended:
                raise

    def why_no_pre_dump(self) -> str:
        return "vzctl has no pre-dump"

    def pre_dump(self, images: Path, parent: Path | None) -> float | None:
        raise MigrateError(VzExitCode.DUMP_FAILED, f"cannot pre-dump: {self.why_no_pre_dump()}")

    def dump(self, images: Path, parent: Path | None = None) -> None:
        self._vzctl(VzExitCode.DUMP_FAILED, "chkpnt", "--dump", "--dumpfile", str(images / DUMP))

    # ---- afterwards

    def discard(self, remove: bool, known: Copied | None) -> None:
        for path in known or () if remove else ():
            copied.check_same(path, known)
        self._unmount()
        conf = self._conf_file()
        if remove and self.state().exists:
            self._vzctl(VzExitCode.DUMP_FAILED, "destroy")
        elif not remove and conf.exists():
            conf.rename(conf.with_name(conf.name + ".migrated"))
