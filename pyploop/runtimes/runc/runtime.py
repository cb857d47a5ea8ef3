# SPDX-License-Identifier: Apache-2.0
"""runc and CRIU.

The container is suspended by its cgroup's freezer, written directly; it stays
so through the dump (--leave-running), and is killed, or thawed, afterwards:
nothing but this host decides that it runs here again.
"""

from __future__ import annotations

from pyploop.runtimes.runc.source import SourceSteps
from pyploop.runtimes.runc.target import TargetSteps


class Runc(SourceSteps, TargetSteps):
    """One container of one host."""

    name = "runc"
