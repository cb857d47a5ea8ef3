# SPDX-License-Identifier: Apache-2.0
"""Podman's pods, migrated live by CRIU."""

from __future__ import annotations

from pyploop.runtimes.podman.pod_source import PodSource
from pyploop.runtimes.podman.pod_target import PodTarget


class PodRuntime(PodTarget, PodSource):
    """One pod of one host."""
