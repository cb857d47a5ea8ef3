# SPDX-License-Identifier: Apache-2.0
"""Options that name what to stop."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pyploop.freeze.stoppers import Spec, parse_spec

FIRST = Spec("cmd", "").name
"""What messages call -F."""


class StopAction(argparse.Action):
    """`-F`, `--freeze` and `--undo`: one list of stop specs, in the order given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option: str | None = None,
    ) -> None:
        specs: list[Spec] = list(getattr(namespace, self.dest) or [])
        text = str(values)
        if option == "-F":
            specs.append(Spec("cmd", text, name=FIRST))
        elif option == "--undo":
            if not specs or specs[-1].kind != "cmd":
                parser.error("--undo must follow the -F or --freeze cmd: that it undoes")
            specs[-1] = replace(specs[-1], undo=text)
        else:
            try:
                specs.append(parse_spec(text))
            except ValueError as e:
                parser.error(f"--freeze: {e}")
        setattr(namespace, self.dest, specs)
