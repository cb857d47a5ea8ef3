# SPDX-License-Identifier: Apache-2.0
"""A container of a pod, which moves together with the others (pods.py)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyploop.runtimes.config import HostConfig, within
from pyploop.runtimes.podman import pod as pods
from pyploop.runtimes.podman.exported import Exported
from pyploop.runtimes.podman.found import Found
from pyploop.runtimes.podman.pod import Pod
from pyploop.runtimes.podman.runtime import PodmanRuntime
from pyploop.runtimes.runc.target import TargetSteps

_JOINED = ("ipc", "uts")
"""Namespaces of the infra container.  The network's has a path in any case."""


class Member(PodmanRuntime):
    """One of them, on one host."""

    def __init__(
        self, host: HostConfig, container: str, pod: Pod | None, elsewhere: tuple[str, ...] = ()
    ) -> None:
        """pod: of this host, if it is there.  elsewhere: folders that others bring."""
        self._of, self._elsewhere = pod, elsewhere
        self.resuming: Callable[[], None] = lambda: None
        """Called before it runs on the target."""
        self._filled = False
        self._infra = ""
        """The ID of the infra container on the target."""
        super().__init__(host, container)

    def _find(self) -> Found | None:
        found = super()._find()
        if found is None or self._of is None or found.id not in self._of.ids:
            return None if self._of is not None else found
        return pods.bare(found, self._of, self._elsewhere)

    @property
    def brings(self) -> tuple[str, ...]:
        """Folders beside its root that move with it."""
        return self._config.trees[1:]

    # ---- on the target

    def join(self, pod: Pod, theirs: str, agreed: Path) -> None:
        """The pod is there.  theirs: the ID of its infra container on the source.  agreed: as
        Early has it."""
        shared = f"/{theirs}/userdata/shm"
        mounts = self._spec.get("mounts") or ()
        used = any(str(m.get("source")).endswith(shared) for m in mounts)
        self._pod = (pod.id, f"{pod.infra.bundle}/shm" if used else "")
        self._infra = pod.infra.id
        self._early.agreed = agreed

    def _named(self, exported: Exported) -> Exported:
        named = super()._named(exported)
        return replace(named, config={**named.config, "pod": self._pod[0]})

    def _fitted_spec(self, spec: Any, root: str, volumes: list[str]) -> dict[str, Any]:
        spec = self._alone(spec)
        if self._infra and self._coming is not None:
            # /etc/hosts and others are the infra container's, which has another ID here.
            it, theirs = self._coming, self._of_infra(spec)
            self._coming = replace(it, owned=[*it.owned, *theirs])
            try:
                return super()._fitted_spec(spec, root, volumes)
            finally:
                self._coming = it
        return super()._fitted_spec(spec, root, volumes)

    def _of_infra(self, spec: Any) -> list[str]:
        """Sources of binds in the folders that Podman has made for this host's infra container."""
        here = self._here
        assert here is not None
        tops = here.folders_of(self._infra)
        sources = [os.path.normpath(str(m.get("source"))) for m in spec.get("mounts") or ()]
        return [s for s in sources if any(within(s, top) for top in tops)]

    def _alone(self, config: Any) -> Any:
        """The namespaces that it joins are those of the host's infra container (`complete` of
        interpose.py)."""
        spec = copy.deepcopy(config)
        if isinstance(spec, dict) and isinstance(spec.get("linux"), dict):
            for one in spec["linux"].get("namespaces") or ():
                if isinstance(one, dict) and one.get("type") in _JOINED:
                    one.pop("path", None)
        return spec

    def fill(self) -> None:
        """Put its files into their places.  OSError, TimeoutError.  MigrateError."""
        if self._early.argv and self._early.ready(self._host.command_timeout):
            self._fill()
            self._filled = True

    def _let_go(self) -> Any:
        return TargetSteps._let_go(self) if self._filled else super()._let_go()

    def _hold_packets(self, images: Path) -> str:
        return ""  # the pod does it, until all of them are restored

    def _resuming(self) -> None:
        self.resuming()

    def _clear(self) -> None:
        self._filled = False
        super()._clear()
