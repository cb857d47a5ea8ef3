# SPDX-License-Identifier: Apache-2.0
"""pyploop: copy a container's disk to another host while it runs."""

__version__ = "0.2.0.dev0"
