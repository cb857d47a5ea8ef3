# SPDX-License-Identifier: Apache-2.0
"""Moving a container to another host: what both ends share.

`mux` carries control messages and channels over one connection.  `commit_record` says
which host runs the container, `undo_kinds` how each step is undone, `deadlines` how
long each end waits.  The two ends are `source` and `target`.  What only one of them needs
belongs there.  This package may import `runtimes`, `diskcopy` and what is below.

A new step that changes something needs a new kind in `undo_kinds`: a function that undoes
the step, can be repeated, and is registered with `undo.journal.register`; and its words in
`undo_kinds.described`.  The step's entry is written into the journal before the step.
"""
