# SPDX-License-Identifier: Apache-2.0
"""The record of how fast earlier migrations from this host to another one were:
STATE_DIR/RUNTIME-ID.rates, one for each target.  The forecast of a suspended time is corrected by
it.  It decides nothing else, so a record that is lost, or cannot be read, costs no more than
the first migration's model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyploop.errors import PyploopError
from pyploop.migration import commit_record
from pyploop.migration.source.suspend_forecast import SAMPLES, Sample
from pyploop.system import private_folder

SCHEMA = "pyploop.rates/1"
"""The number changes when the model changes, since samples are compared with it."""
SUFFIX = ".rates"
LARGEST = 1 << 18
"""Bytes of a record that are read at most."""
STEPS = 32
"""Kinds of steps in a record at most."""

Samples = dict[str, list[Sample]]
"""Step -> its samples, the oldest first."""


def path_of(state_dir: str, runtime: str, host: str) -> Path:
    """host: the target, as the user names it."""
    own = hashlib.blake2b(os.fsencode(host.rpartition("@")[2]), digest_size=16).hexdigest()
    return Path(state_dir) / f"{runtime}-{own}{SUFFIX}"


def read(state_dir: str, runtime: str, host: str) -> Samples:
    """Empty when the host has no rates yet, or its file cannot be read."""
    path = path_of(state_dir, runtime, host)
    try:
        with private_folder.reopened(path.parent) as folder:
            text = private_folder.read(folder, path.name, LARGEST)
        return _parsed(json.loads(text))
    except (OSError, PyploopError):
        return {}
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
        return {}  # it was damaged, or written by hand


def _parsed(record: Any) -> Samples:
    if record.get("schema") != SCHEMA:
        return {}
    found: Samples = {}
    for name, rows in record["steps"].items():
        samples = [Sample(*map(float, row)) for row in rows[-SAMPLES:]]
        found[name] = [s for s in samples if _usable(s)]
    return found


def _usable(s: Sample) -> bool:
    parts = (s.fixed, s.variable, s.actual)
    return all(math.isfinite(p) and p >= 0 for p in parts) and s.fixed > 0


def add(state_dir: str, runtime: str, host: str, shown: Mapping[str, Sample]) -> None:
    """What a migration has shown.  A record that cannot be written is left out: the container
    has moved."""
    samples = read(state_dir, runtime, host)
    for name, sample in shown.items():
        if _usable(sample):
            samples[name] = [*samples.pop(name, []), sample][-SAMPLES:]
    kept = dict(list(samples.items())[-STEPS:])
    rows = {name: [[s.fixed, s.variable, s.actual] for s in of] for name, of in kept.items()}
    data = json.dumps({"schema": SCHEMA, "host": host, "steps": rows}).encode()
    path = path_of(state_dir, runtime, host)
    with contextlib.suppress(OSError, PyploopError):
        folder_path = commit_record.make_folder(Path(state_dir))
        with private_folder.reopened(folder_path) as folder:
            private_folder.replace(folder, path.name, data)
