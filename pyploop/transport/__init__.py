# SPDX-License-Identifier: Apache-2.0
"""A connection to pyploop on another host, through ssh.

Belongs here: the ssh process and its options, the hello, frames, channels, requests and
events of the agent's protocol (docs/internals/agent-protocol.md), and how long each of these
waits.  What the requests mean is not known here: migrations and remote copies have requests
of their own.
"""
