# SPDX-License-Identifier: Apache-2.0
"""The target's end of a migration: `agent` answers the source's requests.

A new request is a method of `agent.Agent`, with its fields in `wire.messages` and a
line in docs/internals/agent-protocol.md.  It may import `migration` and what is below.
"""
