# SPDX-License-Identifier: Apache-2.0
"""The source of a copy and the formats of images.

`opening` finds out what a path is, `source` is the open source; `image` and
`disk_descriptor` read the formats of disk images.  A new format gets a class in
`image`, and its name in docs/internals/images.md.
"""
