# SPDX-License-Identifier: Apache-2.0
"""One lab for many disturbed migrations, and a new one after one that failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Reused(Generic[T]):
    def __init__(self, make: Callable[[int], contextlib.AbstractContextManager[T]]) -> None:
        """make: the lab with this number."""
        self._make, self._number = make, 0
        self._stack = contextlib.ExitStack()
        self._lab: T | None = None
        self._fit = False

    def take(self) -> T:
        """The lab; another one, unless the last one was given back fit."""
        if self._lab is None or not self._fit:
            self.close()
            self._number += 1
            self._lab = self._stack.enter_context(self._make(self._number))
        self._fit = False
        return self._lab

    def fit(self) -> None:
        """It is as it was when it was taken."""
        self._fit = True

    def close(self) -> None:
        self._lab = None
        self._stack.close()
