# SPDX-License-Identifier: Apache-2.0
"""argparse with the exit codes and the strictness of the tools we replace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from pyploop.errors import ExitCode, one_line

T = TypeVar("T")


class _Once(argparse.Action):
    """An option with one value.  A second one would replace the first
    silently (which mount point, which target?), so it is refused."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option: str | None = None,
    ) -> None:
        if self.option_strings and isinstance(parser, Parser):
            parser.given(self.dest, option or self.option_strings[0])
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)


class _OnceConst(_Once):
    """The same for one that stands for a value."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: Any, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, **more)


class Parser(argparse.ArgumentParser):
    """Usage errors go to stderr with the usage, and end with `exit_status`.

    An option with one value may be given once; action="last" is for those of
    which the tools that we replace take the last.
    """

    exit_status: int = ExitCode.PARAMETER

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._given: dict[str, str] = {}
        for name in (None, "store"):
            self.register("action", name, _Once)
        self.register("action", "store_const", _OnceConst)
        self.register("action", "last", argparse._StoreAction)

    def given(self, dest: str, option: str) -> None:
        """The option was met.  It ends the program when another one has set the same."""
        if before := self._given.get(dest):
            if before == option:
                self.error(f"{option} is given twice: give it once")
            self.error(f"{before} and {option} exclude each other: give one of them")
        self._given[dest] = option

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._given = {}
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        print(one_line(f"{self.prog}: {message}"), file=sys.stderr)
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
