# SPDX-License-Identifier: Apache-2.0
"""A container with memory, whose live migrations load it while the container runs there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gates import Gates, gates
from lab import container, hosts, requirements, verify
from lab.hosts import Host, Lab
from moving import files
from support import MIB


@dataclass
class Scene:
    """The container runs on a."""

    lab: Lab
    client: verify.Client
    gates: Gates
    """Of the target."""
    before: set[str]


@contextlib.contextmanager
def scene(memory: int) -> Iterator[Scene]:
    """memory: bytes that the container holds and rewrites."""
    requirements.check()
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(hosts.lab())
        before = files(lab.b)
        stack.enter_context(container.container(lab, size=192 * MIB, memory=memory))
        client = stack.enter_context(verify.client(lab))
        yield Scene(lab, client, stack.enter_context(gates(lab.b)), before)


def status(host: Host) -> dict[str, Any]:
    """`pyploop status --json` of the container."""
    words = ["pyploop", "status", "--json", "--config", container.PYPLOOP_CONFIG, container.NAME]
    return dict(json.loads(host.run(*words, check=False)))
