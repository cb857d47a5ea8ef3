# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders share; helpers are in tests/support.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "fakeploop"), str(HERE.parent)]


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    """A test that leaves a descriptor open fails."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    import gc

    left = set(os.listdir("/proc/self/fd")) - before
    if left:
        gc.collect()
        left &= set(os.listdir("/proc/self/fd"))
    names = {
        fd: os.readlink(f"/proc/self/fd/{fd}")
        for fd in left
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    assert not names, f"descriptors left open: {names}"
