# SPDX-License-Identifier: Apache-2.0
"""The parts of a copy, measured one by one on the user's own machines (`pyploop bench`).

stages   what a measured stage is
source   reading, and what is done with the data: zero test, digest
target   writing and making durable, in a folder
line     pipes and ssh connections
freezes  freezing the source's file systems, and what is written to it
forecast what limits a copy, how long it and its freeze take (pure)
report   the table and the sentences

A new stage is a function that returns a Stage.  It is added to `run`, and to `forecast` if
a copy waits for it.
"""
