# SPDX-License-Identifier: Apache-2.0
"""OpenVZ containers, on a ploop disk or in a directory (simfs), by vzctl's
documented contract.

The suspended container is undumped on the target, and only resumed after the
commit: so it is vzctl's own two steps that the turning point lies between.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyploop.disks import disk_descriptor
from pyploop.errors import MigrateError, ParameterError, PyploopError, VzExitCode
from pyploop.freeze.vzctl import parse_status
from pyploop.runtimes import LARGEST_FILE, Copied, Disk, Facts, Item, State, Tree, copied, volumes
from pyploop.runtimes.config import CTID, NAME, HostConfig, within
from pyploop.runtimes.vzctl import conf_check, config_files
from pyploop.system import beneath, mount_table, sysblock
from pyploop.system.commands import Command, last_words, run
from pyploop.system.tree_walk import walk

SCRIPTS = ("start", "stop", "mount", "umount", "premount", "postumount")
HDD = "root.hdd"
DUMP = "Dump"
NOT_YET = ".pyploop-not-yet"
"""End of the name of an action script, or a configuration, which vzctl must not see
yet."""
MOST_FILES = 1000
"""Of a private area, whose container's files lie inside the disk."""
LARGEST_TEXT = 1 << 20
"""Bytes of CTID.conf, and of a script."""
_SPECIAL = {
    5: VzExitCode.NO_KERNEL,
    9: VzExitCode.LOCKED,
    **dict.fromkeys(range(60, 67), VzExitCode.QUOTA),
}
"""vzctl's exit codes that have one of vzmigrate's own, whatever failed."""


class Vzctl:
    """One container of one host."""

    name = "vzctl"
    dump_writes = True
    """The kernel gives deleted files that are open a name below VE_PRIVATE."""

    drop_exec = False
    locks_itself = True

    def __init__(self, host: HostConfig, container: str) -> None:
        self._host = host
        self.container = container if CTID.fullmatch(container) else self._resolve(container)
        self.keep_fds: tuple[int, ...] = ()
        self._top = f"{HDD}/root.hds"
        self._left: list[str] = []
        self._policy = host.policy_of(self.container)
        self._scripts: list[str] = []
        """Action scripts that have come."""
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

    # ---- source

    def check_source(self, live: bool) -> Facts:
        # Decided once: a container whose root it is can change what lies there.
        self._simfs = self._is_simfs()
        self._check_root()
        self._left = [
            f"{e.source} ({e.root}) is mounted on {e.point}, within the container, and does not "
            "move: the target has to have what its mount script mounts there"
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
        """MigrateError(15) unless what is mounted on VE_ROOT is the private area's, as
        far as the mount table tells."""
        mounted = mount_table.at(self._root)
        if mounted is None:
            if (state := self.state()).running or state.mounted:
                raise MigrateError(
                    VzExitCode.BAD_CONFIG,
                    f"nothing is mounted on {self._root}, or something hides it",
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

    def _files(self) -> Iterator[Path]:
        """The private area without the top delta, which the disk's copy brings;
        nothing of a simfs container's, which is a tree."""
        if self._is_simfs():
            return
        found: list[Path] = []
        with contextlib.suppress(FileNotFoundError):
            for names, _, entries in walk(str(self._private)):
                found += [self._private.joinpath(*names, e.name) for e in entries]
                if len(found) > MOST_FILES:
                    why = f"has more than {MOST_FILES} files: no ploop disk"
                    raise MigrateError(VzExitCode.COPY_FAILED, f"{self._private} {why}")
        yield from (path for path in sorted(found) if path != self._private / self._top)

    def _script(self, name: str) -> Path:
        return Path(self._host.vz_etc) / "conf" / f"{self.container}.{name}"

    def items(self) -> list[Item]:
        conf = Path(self._host.vz_etc) / "conf"
        result = [Item("conf", f"{conf}/{self.container}.conf")]
        for script in SCRIPTS:
            if (path := self._script(script)).exists():
                result.append(Item(f"script:{script}", str(path)))
        for path in self._files():
            if path.is_file() and not path.is_symlink():
                label = f"private:{path.relative_to(self._private)}"
                result.append(Item(label, str(path)))
        return result

    def suspend(self) -> None:
        self._vzctl(VzExitCode.DUMP_FAILED, "chkpnt", "--suspend")

    def resume(self) -> None:
        try:
            self._vzctl(VzExitCode.DUMP_FAILED, "chkpnt", "--resume")
        except MigrateError:
            # vzctl refuses to resume what is not suspended (any more).
            state = self.state()
            if not state.running or state.suspended:
                raise

    def why_no_pre_dump(self) -> str:
        return "vzctl has none"

    def pre_dump(self, images: Path, parent: Path | None) -> float | None:
        raise MigrateError(VzExitCode.DUMP_FAILED, f"no pre-dump: {self.why_no_pre_dump()}")

    def dump(self, images: Path, parent: Path | None = None) -> None:
        self._vzctl(VzExitCode.DUMP_FAILED, "chkpnt", "--dump", "--dumpfile", str(images / DUMP))

    def kill(self) -> None:
        state = self.state()
        if state.running:
            self._vzctl(VzExitCode.DUMP_FAILED, "chkpnt", "--kill")
        self._unmount()

    def _unmount(self) -> None:
        if self.state().mounted:
            self._vzctl(VzExitCode.DUMP_FAILED, "umount")

    def stop(self) -> None:
        # Its disk is still read, and stays mounted for that.
        if self.state().running:
            self._vzctl(VzExitCode.DUMP_FAILED, "stop", "--skip-umount")

    def start(self) -> None:
        if not self.state().running:
            self._vzctl(VzExitCode.RESTORE_FAILED, "start")

    def discard(self, remove: bool, known: Copied | None) -> None:
        for path in known or () if remove else ():
            copied.check_same(path, known)
        self._unmount()
        conf = Path(self._host.vz_etc) / "conf" / f"{self.container}.conf"
        if remove and self.state().exists:
            self._vzctl(VzExitCode.DUMP_FAILED, "destroy")
        elif not remove and conf.exists():
            conf.rename(conf.with_name(conf.name + ".migrated"))

    # ---- target

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

    def destination(self, label: str) -> str:
        conf = Path(self._host.vz_etc) / "conf"
        kind, _, rest = label.partition(":")
        if label == "conf":
            return f"{conf / self.container}.conf{NOT_YET}"
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
        made.append(f"{Path(self._host.vz_etc)}/conf/{self.container}.conf")
        return made + [str(self._script(name)) for name in self._scripts]

    def root_of(self, path: str) -> str:
        return str(self._private) if within(path, str(self._private)) else ""

    def folders(self) -> list[str]:
        return [str(self._private), self._root]

    def placed(self, facts: Facts) -> None:
        for link, text in self._links(facts).items():
            with beneath.place(str(self._private / link), str(self._private)) as at:
                os.symlink(text, at.name, dir_fd=at.dir_fd)
        path = Path(self._host.vz_etc) / "conf" / f"{self.container}.conf"
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
