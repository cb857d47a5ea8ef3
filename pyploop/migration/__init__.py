# SPDX-License-Identifier: Apache-2.0
"""Moving a container to another host: what both ends share.

`mux` carries control messages and channels over one connection.  `commit_record` says
which host runs the container, `undo_kinds` how each step is undone, `deadlines` how
long each end waits.  The ends are `source` and `target`; what only one of them needs
belongs there.  It may import `runtimes`, `diskcopy` and what is below.

A new step that changes something is a new kind in `undo_kinds`: a function that undoes
it, can be repeated, and is registered with `undo.journal.register`.  The step's
entry is in the journal before the step.
"""
