# SPDX-License-Identifier: Apache-2.0
"""How long each end of a connection waits, in seconds, in one place.

Read them as `deadlines.NAME`, so that a change here works everywhere (tests/lab/slowly.py
makes them longer for an emulated machine).
"""

CONNECT = 30.0
"""For ssh and the agent, until the agent's hello has come."""
HELLO = 30.0
"""For the hello of the end that asks, at the agent."""
PING_EVERY = 2.0
"""Between two pings, which both ends send."""
SILENCE = 30.0
"""Without a byte from the peer, which pings.  Then the connection is ended."""
LAST_WORDS = 0.2
"""For ssh to end after its connection, so that all of its output is read."""
LANE_STALL = 20.0
"""For a segment to arrive that holds up what the other lanes of a bundle have brought."""
ENDING = 10.0
"""For the agent to undo, and to end.  Then ssh is killed."""
GLANCE = 0.5
"""Between two checks whether an answer is still needed."""
