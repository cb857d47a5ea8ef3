# SPDX-License-Identifier: Apache-2.0
"""Podman's containers, migrated live by CRIU."""

from __future__ import annotations

from pyploop.runtimes.podman.source import PodmanSource
from pyploop.runtimes.podman.target import PodmanTarget


class PodmanRuntime(PodmanTarget, PodmanSource):
    """One container of one host."""

    name = "podman"
