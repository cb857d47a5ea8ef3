# SPDX-License-Identifier: Apache-2.0
"""What a program can ask of pyploop; `pyploop/__init__.py` has the public names.

Our own command line and `libploop` stand on it, and other programs import it.  A module
here has one verb with its options and its result.  It may import every room but `cli` and
`libploop`, and imports at the top only what its verb needs: a copy loads nothing of a
migration.  Nothing in it prints, ends the process, or changes `sys` or a signal's handler.
A new verb is a module here, and a line in the table of `pyploop/__init__.py`.
"""
