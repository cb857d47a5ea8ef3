# SPDX-License-Identifier: Apache-2.0
"""The target's end of a migration: `agent` answers the source's requests.

`checks` comes before any change.  `incoming` is what was made for one migration, `settle`
what became of earlier ones.  `resumable_*` are data that outlive a failure (--keep-dst).

A new request is a method of `agent.Agent`, with its fields in `wire.messages` and a line in
docs/internals/agent-protocol.md.  Older agents do not know it, so a source may use it only
when the agent's `checks.CAPABILITIES` name it.

This package may import `migration` and what is below.
"""
