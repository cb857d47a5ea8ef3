# SPDX-License-Identifier: Apache-2.0
"""A runc container on this host: its state, its first process and its cgroup, and what
both hosts do with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.freeze.cgroup_freezer import freezer_in
from pyploop.runtimes import Facts, State, memory_in_use, volumes
from pyploop.runtimes.config import ContainerConfig, HostConfig
from pyploop.runtimes.configured import Configured
from pyploop.runtimes.oci import bundles
from pyploop.runtimes.runc import announce, link, local_packets, tmpfs
from pyploop.runtimes.runc.cgroup import ContainerCgroup
from pyploop.runtimes.runc.early import Early
from pyploop.system.commands import run
from pyploop.undo import journal

PREVIEW = 0.25
"""A dump may be larger than the memory in use by this part of it."""


class RuncContainer(Configured):
    """One container of one host, as `runc` and this host's configuration know it."""

    def __init__(self, host: HostConfig, container: str) -> None:
        self.container = container
        self.keep_fds: tuple[int, ...] = ()
        self.lock_dir = host.lock_dir
        self._host = host
        self._config = self._configured()
        # CRIU then gives a deleted file that has other names a new one, for the restore.
        self._early = Early()
        self.dump_writes = "--link-remap" in self._config.options

    # ---- what there is

    def _configured(self) -> ContainerConfig:
        """What this host knows of the container, whatever its state is."""
        config = self._host.container(self.container)
        if not config.bundle.startswith("/") or not (config.disks or config.trees):
            raise MigrateError(
                VzExitCode.USAGE,
                f"[container.{self.container}] needs an absolute path as its bundle, and at least "
                "one disk or tree",
                path=self._host.path,
            )
        return config

    @property
    def runc_id(self) -> str:
        """Its name for runc."""
        return self.container

    def _record(self) -> dict[str, Any] | None:
        """runc's own state file, which names the first process and the cgroups.  None: runc
        knows no such container."""
        path = Path(self._host.runc_root) / self.runc_id / "state.json"
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            why = e.strerror if isinstance(e, OSError) else f"it is not runc's state file ({e})"
            raise MigrateError(
                VzExitCode.NO_CONTAINER, f"cannot read {path}: {why}", path=str(path)
            ) from e
        return record if isinstance(record, dict) else None

    def _freezer(self) -> ContainerCgroup | None:
        record = self._record()
        if record is None:
            return None
        paths = record.get("cgroup_paths") or {}
        folder = paths.get("freezer") or paths.get("")
        freezer = freezer_in(Path(folder)) if folder else None
        return ContainerCgroup(freezer) if freezer else None

    def state(self) -> State:
        record = self._record()
        mounted = any(volumes.is_mounted(d.mount) for d in self._config.disks)
        if record is None:
            return State(False, mounted=mounted)
        started = journal.start_time(int(record.get("init_process_pid") or 0))
        running = started is not None and started == record.get("init_process_start")
        # While this file exists the first process is still runc's own.  A file of the
        # container (a FIFO as /etc/passwd) can make it wait for ever.
        running &= not Path(self._host.runc_root, self.runc_id, "exec.fifo").exists()
        freezer = self._freezer()
        frozen = running and freezer is not None and freezer.is_frozen()
        return State(True, running, frozen, mounted)

    def _init(self) -> int:
        """The pid of the container's first process; 0: it does not run."""
        return int((self._record() or {}).get("init_process_pid") or 0)

    def _cgroups(self) -> dict[str, str]:
        """Controller -> folder; '' is the controller of v2."""
        return (self._record() or {}).get("cgroup_paths") or {}

    def _memory_of(self, freezer: ContainerCgroup) -> int:
        files = sum(used.size for used in tmpfs.used_by(self._init()))
        return memory_in_use.memory_of(freezer.pids(), self._cgroups(), files)

    def _check_memory(self, facts: Facts) -> None:
        """MigrateError(6) when this host has no room for the dump."""
        need = int(size_of(facts.get("memory")) * (1 + PREVIEW))
        st = os.statvfs(self._host.images_dir)
        if st.f_bavail * st.f_frsize < need:
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"{self._host.images_dir} has no room for {need >> 20} MiB of memory images: set "
                "images_dir in migrate.toml to a larger file system",
                path=self._host.images_dir,
            )

    # ---- commands

    def _runc(self, log: Path | None = None) -> list[str]:
        """log: where runc writes why it failed."""
        words = [self._host.runc, "--root", self._host.runc_root, "--criu", self._host.criu]
        return [*words, "--log", str(log)] if log is not None else words

    def give_up(self) -> None:
        self._early.drop()

    def _link(self, argv: tuple[str, ...], code: int) -> None:
        """Run link_up or link_down.  MigrateError(code)."""
        if argv and not self._linked(argv):
            run(argv, code, self._host.command_timeout)

    def _linked(self, argv: tuple[str, ...]) -> bool:
        """Whether it was a plain command, and is done."""
        wanted = link.plain(argv)
        try:
            if wanted is not None:
                link.set_up(*wanted)
        except OSError:
            return False  # the command says why, and knows more names
        return wanted is not None

    def _announce(self, namespace: str, *, resumed: bool = False) -> None:
        """Tell switches and neighbours where the container's addresses are now."""
        # A neighbour that misses it asks by itself when its entry is too old.
        with contextlib.suppress(OSError):
            announce.addresses(namespace, resumed=resumed)

    def _let_packets_in(self) -> None:
        """After a dump or a restore, perhaps of a process that is gone.  MigrateError(8)."""
        paths = [f"/proc/{self._init()}/ns/net"]
        with contextlib.suppress(MigrateError, AttributeError, KeyError, TypeError):
            # It is there, and stays, when the container has ended.
            found = bundles.read(self._config.bundle)["linux"]["namespaces"]
            paths = [str(n["path"]) for n in found if n["type"] == "network" and n.get("path")]
            paths = paths or [f"/proc/{self._init()}/ns/net"]
        for path in paths:
            if os.path.exists(path):
                local_packets.open_again(path)

    def kill(self) -> None:
        if freezer := self._freezer():
            freezer.kill()
        with contextlib.suppress(MigrateError):
            self._let_packets_in()
        if self._record() is not None:
            run(
                [*self._runc(), "delete", "--force", self.runc_id],
                VzExitCode.DUMP_FAILED,
                self._host.command_timeout,
            )

    def stop(self) -> None:
        pid = self._init()
        if pid and self.state().running:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + self._config.stop_timeout
            while self.state().running and time.monotonic() < deadline:
                time.sleep(0.02)
        self.kill()
        self._link(self._config.link_down, VzExitCode.DUMP_FAILED)

    def start(self) -> None:
        self._mount_all()
        if not self.state().exists:
            self._run()
        self._link(self._config.link_up, VzExitCode.RESTORE_FAILED)

    def _run(self) -> None:
        command = [*self._runc(), "run", "--detach", "--bundle", self._config.bundle]
        command.append(self.runc_id)
        run(
            command,
            VzExitCode.RESTORE_FAILED,
            self._host.command_timeout,
            self.keep_fds,
            silent=True,
        )


def size_of(value: Any) -> int:
    """Bytes of memory, as the source has announced them.  MigrateError(15) when the value
    is not a number."""
    if type(value) is not int and value is not None:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"the source announces {str(value)[:40]!r} as the size of the memory, which is not a "
            "number",
        )
    return min(max(value or 0, 0), 1 << 60)
