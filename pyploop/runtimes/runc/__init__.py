# SPDX-License-Identifier: Apache-2.0
"""runc containers, migrated live by CRIU.

`container`, `source` and `target` have the steps of a migration.  The other modules know
what a container consists of (`contents`, `members`, `cgroup`), what a host must have
(`host_fit`, `criu`, `memory_tracking`), and what cannot be migrated (`leftovers`,
`sockets`).

May import the runtimes' protocol, `runtimes.oci` and the packages below them.
"""
