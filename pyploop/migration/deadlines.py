# SPDX-License-Identifier: Apache-2.0
"""How long each end of a migration waits, in seconds, in one place.

Read them as `deadlines.NAME`, so that a change here works everywhere (tests/lab/slowly.py
makes them longer for an emulated machine).  Waits that the user sets are elsewhere:
`stall` and `--suspend-limit`.  Those of the connection itself are in transport/deadlines.py.
"""

# ---- requests, at the source

REQUEST = 30.0
"""For a request that only starts something."""
CHECKING = 120.0
"""For the target's checks.  A probe of CRIU is among them."""
PROBING = 30.0
"""For the target to read the few bytes of a probe of the connection."""
RESTORING = 300.0
"""For the target to restore, or to start, the container."""
UNDOING = 120.0
"""For the target to undo a restore that was not answered in time."""
SETTLING = 120.0
"""For the target to say what became of a migration.  It may wait SETTLE_WAIT itself."""
ATTEMPTS = 60.0
"""While a target does not answer, it is asked again every RETRY, for so long."""
RETRY = 2.0
LOADING = 120.0
"""For the memory of a container, which came here by a lazy restore, to be loaded."""
DUMP_WAIT = 180.0
"""For a dump whose orchestrator was killed to end."""

# ---- requests, at the agent

UNASKED = 60.0
"""Without a request before `check`, even if pings come.  Then the connection is ended."""
UNBEGUN = 600.0
"""The same between `check` and `begin`, and in a migration that is receiving nothing: it
takes one of the host's places.  The source may be trying CRIU meanwhile."""
IDLE = 24 * 3600.0
"""The same while something is received.  That has its own limit, `stall`."""
LONGEST_STALL = 24 * 3600.0
"""For a byte of a stream, whatever `stall` the source asks for."""
LANE = 10.0
"""For a lane to come, whose process at this host has said that it is ready."""
SETTLE_WAIT = 60.0
"""For another process that may still decide where the container runs."""
UNMOVED = 10.0
"""For receivers to end by themselves, before an undo.  Nothing comes any more."""
INTERRUPTED = 600.0
"""After UNMOVED, for receivers to end while they are interrupted again and again."""

# ---- rsync

RSYNC_VERSION = 30.0
"""For rsync to print its version."""
RSYNC_READY = 30.0
"""For rsync to start its remote shell."""
RSYNC_LOOK = 0.2
"""Between two checks of the connection and of a running rsync."""
RSYNC_SOONEST = 0.01
"""The same when rsync has just started, or has just waited for a FIFO's other end."""
RSYNC_ENDING = 1.0
"""For an rsync client to end after its connection."""
