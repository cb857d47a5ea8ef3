# SPDX-License-Identifier: Apache-2.0
"""The source of a copy, and the formats of disk images.

- `opening` finds out what a path is; `source` is the open source; `identity` and
  `write_counters` show whether it has changed.
- `image` and `disk_descriptor` read the formats of disk images.
- `backing` goes from a file or device down to the disks below it.

A new image format gets a class in `image`, a name in `disk_descriptor.FORMATS` when
descriptors can name it, and a section in docs/internals/images.md.  A new kind of source gets an
`_open_…` function in `opening`.  This package may import `usage`, `undo` and the packages
below them.
"""
