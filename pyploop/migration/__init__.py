# SPDX-License-Identifier: Apache-2.0
"""Moving a container to another host: what both ends share.

`mux` carries control messages and channels over one connection, `commit_record` says
which host runs the container, `undo_kinds` how each step is undone.  The ends are
`source` and `target`.  It may import `runtimes`, `diskcopy` and what is below.
"""
