# SPDX-License-Identifier: Apache-2.0
"""pyploop: copy a container's disk to another host while it runs."""

import os
import sys

__version__ = "0.2.0.dev0"

# `python3 -m pyploop…` has put the current folder before Python's own modules, and
# in somebody else's folder there may be a `re.py`.  Not where the package itself is.
_home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_by_name = sys.argv[:1] == ["-m"] and not sys.flags.safe_path
if _by_name and sys.path and os.path.realpath(sys.path[0]) != _home:
    del sys.path[0]
