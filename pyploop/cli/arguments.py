# SPDX-License-Identifier: Apache-2.0
"""argparse with the exit codes and the strictness of the tools we replace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """Usage errors go to stderr with the usage, and end with `exit_status`."""

    exit_status = 38

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        self.print_usage(sys.stderr)
        raise SystemExit(self.exit_status)


def parsed(parse: Callable[[str], T], what: str) -> Callable[[str], T]:
    """`parse` for argparse: its ValueError becomes the message."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from e

    convert.__name__ = what
    return convert
