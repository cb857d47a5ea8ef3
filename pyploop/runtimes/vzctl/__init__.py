# SPDX-License-Identifier: Apache-2.0
"""OpenVZ containers, migrated by vzctl's documented commands.

`container`, `source` and `target` have the steps of a migration.  `config_files` reads
vz.conf and CTID.conf as a shell would, and `conf_check` checks a CTID.conf that comes
from another host.

May import the runtimes' protocol and the packages below it.
"""
