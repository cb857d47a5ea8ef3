# SPDX-License-Identifier: Apache-2.0
"""Keeps a command that is started by `python -m` from importing somebody else's modules.

Python puts the current folder before its own modules then, and there may be a `re.py`.
So the modules that `python -m` runs call this before their first import.  It may import
only what the interpreter has loaded by then; `from __future__` is an import, too.
"""

import os
import sys


def leave_current_folder() -> None:
    """Drop the current folder from `sys.path`, unless the package itself is there."""
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    if not sys.flags.safe_path and sys.path and os.path.realpath(sys.path[0]) != home:
        del sys.path[0]
