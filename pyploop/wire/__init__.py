# SPDX-License-Identifier: Apache-2.0
"""Bytes to values and back: the dialects of the copy stream, the agent's protocol, and
CRIU's images.

- `d1`, `d2`, `d3`: the dialects of `ploop copy` and its packets (docs/internals/protocol.md).
- `mux`, `messages`: frames and messages of the migration's agent
  (docs/internals/agent-protocol.md).
- `protobuf`, `criu`: the parts of CRIU's images that the target checks.

No module here does I/O or has a clock, so each can be tested and fuzzed with bytes alone.
It may import only `errors` and `units`.  A new dialect gets a module with its control
frames, a section in docs/internals/protocol.md, and a strategy in `diskcopy.framing`.  Its
data frames are made and parsed in C (csrc/).
"""
