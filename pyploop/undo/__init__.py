# SPDX-License-Identifier: Apache-2.0
"""What must be undone, held in three places: in the process, in a watchdog process,
and in a journal on disk.

`watchdog` runs by its path, without the
package.  A new kind of step registers itself by `journal.register(kind, undo)`, in the
room that knows how it is undone.
"""
