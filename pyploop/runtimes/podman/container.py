# SPDX-License-Identifier: Apache-2.0
"""A container of Podman on this host, and what both hosts do with it."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes import State
from pyploop.runtimes.checks import naming
from pyploop.runtimes.config import ContainerConfig, HostConfig
from pyploop.runtimes.podman import links, systemd
from pyploop.runtimes.podman.command import Podman
from pyploop.runtimes.podman.found import Found, find, lies_in
from pyploop.runtimes.policy import Policy
from pyploop.runtimes.runc import members
from pyploop.runtimes.runc.container import RuncContainer

ID = re.compile(r"[0-9a-f]{64}")
STAGE = "pyploop-incoming"
"""The folder below Podman's graph root in which what comes waits for its place."""


class PodmanContainer(RuncContainer):
    """One container of one host, as Podman and runc know it."""

    needs_trust = True
    """The target's Podman makes the container from the source's description of it."""

    def __init__(self, host: HostConfig, container: str) -> None:
        self._podman = Podman(host.podman, host.command_timeout)
        self._found: Found | None = None
        self.instance: dict[str, Any] = {}
        super().__init__(host, container)

    def _configured(self) -> ContainerConfig:
        """Of what is found here.  On the target nothing is, before it has come."""
        self._found = found = self._find()
        policy = _policy(self._host.policy_of(self.container))
        made = ContainerConfig(self.container, runtime="podman", policy=policy)
        if found is None:
            return made
        self.instance = {"id": found.id, "volumes": {v.name: v.path for v in found.volumes}}
        moved = [b for b in found.binds if self._is_moved(b)]
        return replace(
            made,
            bundle=found.bundle,
            trees=(found.upper, *(v.path for v in found.volumes), *moved),
            stop_timeout=float((found.raw.get("Config") or {}).get("StopTimeout") or 10),
            link_up=self._link_command(found.namespace, True),
            link_down=self._link_command(found.namespace, False),
        )

    def _find(self) -> Found | None:
        with naming("podman"):  # the first that asks it, on either host
            return find(self._podman, self.container)

    def _is_moved(self, path: str) -> bool:
        """Whether a bind mount lies in one of the configured places."""
        return lies_in(path, self._host.podman_binds)

    def _link_command(self, namespace: str, up: bool) -> tuple[str, ...]:
        """link_up or link_down; empty without links, and for those that cannot be cut."""
        ends: list[str] = []
        with contextlib.suppress(OSError, MigrateError):
            ends = links.host_ends(namespace) if namespace else []
        return links.set_all(ends, up)

    @property
    def _units(self) -> list[systemd.Unit]:
        """The systemd units that start it."""
        return [systemd.parse(u) for u in self.instance.get("units") or ()]

    @property
    def runc_id(self) -> str:
        return str(self.instance.get("id") or "")

    def state(self) -> State:
        if not self.runc_id:
            return State(self._podman.says_yes("container", "exists", self.container))
        known = super().state()
        if known.exists:
            return replace(known, suspended=known.suspended or (known.running and self._held()))
        names = (self.runc_id, self.container)
        return State(any(self._podman.says_yes("container", "exists", n) for n in names))

    def is_pod(self) -> bool:
        """Podman has no container of this name, but a pod."""
        return self._found is None and self._podman.says_yes("pod", "exists", self.container)

    def _exists(self) -> bool:
        """Podman has the container with this ID, whatever its name is."""
        return bool(self.runc_id) and self._podman.says_yes("container", "exists", self.runc_id)

    def _held(self) -> bool:
        """Whether all its processes are stopped, as `_hold_processes` leaves them."""
        freezer = self._freezer()
        found = members.look_at(freezer.pids()) if freezer else {}
        return bool(found) and all(p.state in "TZX" for p in found.values())

    def _hold_processes(self) -> None:
        """Stop all its processes by a signal, and thaw it: Podman does not end a container that
        is frozen, and none of them may run again.  Their connections end without a packet."""
        if freezer := self._freezer():
            freezer.hold()

    def stop(self) -> None:
        systemd.stop(self._units, self._podman.timeout + self._config.stop_timeout)
        seconds = str(round(self._config.stop_timeout))
        self._podman.run(
            *("container", "stop", "-t", seconds, self.runc_id),
            code=VzExitCode.DUMP_FAILED,
            timeout=self._podman.timeout + self._config.stop_timeout,
        )


def _policy(policy: Policy) -> Policy:
    """What each container of Podman has, as Podman itself makes it on either host."""
    return replace(policy, unprotected=(*policy.unprotected, "/proc/asound"))
