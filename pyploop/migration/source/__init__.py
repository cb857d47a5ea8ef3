# SPDX-License-Identifier: Apache-2.0
"""The source's end of a migration: `orchestrator` is its story, from top to bottom.

`checks` comes before any change.  `stages` has the stages, each of which returns the next.
`move` is what they share, and how a migration ends.  `recover` rolls back or finishes what
a killed migration left.  A new kind of payload (disks, trees, memory) is a class with the
steps of `payload`.

This package may import `migration` and what is below, and nothing of `migration.target`:
the target is reached only through `agent_client`.
"""
