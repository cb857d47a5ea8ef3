# SPDX-License-Identifier: Apache-2.0
"""Programs of this package that other programs start in place of the host's."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "helpers"
"""In it is nothing but `tar`, which packs and unpacks a tmpfs (csrc/tmpfs_tar)."""


def has_tar() -> bool:
    """Whether it was built with this package, and can be run."""
    return os.access(FOLDER / "tar", os.X_OK)
