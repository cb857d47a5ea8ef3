# SPDX-License-Identifier: Apache-2.0
"""The target's end of a migration: `agent` answers the source's requests.

`checks` comes before any change; `incoming` is what was made for one migration, and
`settle` what became of earlier ones; `resumable_*` outlives a failure (--keep-dst).
A new request is a method of `agent.Agent`, with its fields in `wire.messages` and a line
in docs/internals/agent-protocol.md.  A source may use it only when the agent has named it among its
`checks.CAPABILITIES`: older agents do not know it.

It may import `migration` and what is below.
"""
