# SPDX-License-Identifier: Apache-2.0
"""Named steps and their seconds, in order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Timeline:
    """Seconds by name of step."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time of the body to `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.steps[name] = self.steps.get(name, 0.0) + time.monotonic() - start
