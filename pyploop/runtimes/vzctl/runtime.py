# SPDX-License-Identifier: Apache-2.0
"""OpenVZ containers, on a ploop disk or in a directory (simfs), migrated by vzctl's
documented commands.

The target first undumps the suspended container, and resumes it after the commit.  These
are two steps of vzctl, so the commit point lies between them.
"""

from __future__ import annotations

from pyploop.runtimes import Lazy, Pages
from pyploop.runtimes.unprepared import Unprepared
from pyploop.runtimes.vzctl.source import SourceSteps
from pyploop.runtimes.vzctl.target import TargetSteps


class Vzctl(SourceSteps, TargetSteps, Unprepared):
    """One container of one host."""

    name = "vzctl"
    dump_writes = True
    """The kernel gives an open file without a name a new one below VE_PRIVATE."""

    drop_exec = False
    peer_takes: frozenset[str] = frozenset()
    locks_itself = True
    lazy: Lazy | None = None
    pages: Pages | None = None
