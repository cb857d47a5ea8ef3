# SPDX-License-Identifier: Apache-2.0
"""OpenVZ containers, on a ploop disk or in a directory (simfs), by vzctl's
documented contract.

The suspended container is undumped on the target, and only resumed after the
commit: so it is vzctl's own two steps that the turning point lies between.
"""

from __future__ import annotations

from pyploop.runtimes.vzctl.source import SourceSteps
from pyploop.runtimes.vzctl.target import TargetSteps


class Vzctl(SourceSteps, TargetSteps):
    """One container of one host."""

    name = "vzctl"
    dump_writes = True
    """The kernel gives deleted files that are open a name below VE_PRIVATE."""

    drop_exec = False
    locks_itself = True
