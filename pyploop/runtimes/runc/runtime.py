# SPDX-License-Identifier: Apache-2.0
"""runc containers, migrated live by CRIU.

pyploop suspends a container by writing to the freezer of its cgroup.  It stays suspended
through the dump (--leave-running).  Afterwards it is killed or thawed, so only this host
decides whether it runs here again.
"""

from __future__ import annotations

from pyploop.runtimes.runc.source import SourceSteps
from pyploop.runtimes.runc.target import TargetSteps


class Runc(SourceSteps, TargetSteps):
    """One container of one host."""

    name = "runc"
