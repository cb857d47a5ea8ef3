# SPDX-License-Identifier: Apache-2.0
"""What a run tells: events, their renderers, the timeline of both ends, tables.

It may import `wire`, `errors` and `units`.  A new renderer implements
`events.Renderer`; a new event gets a line in docs/reference/events.md.
"""
