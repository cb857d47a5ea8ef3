# SPDX-License-Identifier: Apache-2.0
"""What a run reports: events and their renderers, the timeline of both ends, tables.

- `events`: the events of a run, and where they are printed.
- `timeline`, `timings`: when each step happened, and the table of `-t`.
- `slow_steps`: a note about a step that takes long.

It may import `wire`, `errors` and `units`.  A new renderer implements `events.Renderer`;
a new event gets a line in docs/reference/events.md.
"""
