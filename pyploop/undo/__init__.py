# SPDX-License-Identifier: Apache-2.0
"""The steps that must be undone, kept in three places.

- `ledger`: in the process that did them.
- `watchdog`: in a process that undoes them when the first one is killed or too slow.  It
  runs by its path, without the package, and imports only the standard library.
- `journal`: on disk, for `pyploop thaw` after both processes have ended.

A new kind of step registers itself with `journal.register(kind, undo)`, in the package
that knows how to undo it.  This package may import `system` and the packages below it.
"""
