# SPDX-License-Identifier: Apache-2.0
"""The source's end of a migration: `orchestrator` is its story, from top to bottom.

A new kind of payload (disks, trees, memory) is a class with the steps of `payload`.
It may import `migration` and what is below, and nothing of `migration.target`: the
target is reached through `agent_client` alone.
"""
