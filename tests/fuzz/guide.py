#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fuzz the agent's protocol (conversations.py), guided by coverage.

    tests/fuzz/guide.py {frames|messages|agent|source} [libFuzzer's options]

needs atheris (pip).  The corpus is in the folder $PYPLOOP_FUZZ_DIR; figures come
at the end.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pyploop"]):
    import conversations

from made_up import world
from scripts import WORDS


def main() -> None:
    name = sys.argv.pop(1)
    run, seeds = conversations.TARGETS[name]
    corpus = Path(os.environ.get("PYPLOOP_FUZZ_DIR", "fuzz-corpus"))
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
    words = corpus.with_name(f"{corpus.name}.words")
    quoted = (word.replace("\\", "\\\\").replace('"', '\\"') for word in WORDS)
    words.write_text("".join(f'"{word}"\n' for word in quoted))
    stack = contextlib.ExitStack()
    here = stack.enter_context(world())

    def end() -> None:
        print(f"{name}: {here.figures()}", file=sys.stderr, flush=True)
        stack.close()

    atexit.register(end)
    options = [*sys.argv, str(corpus), f"-dict={words}", "-max_len=6000", "-timeout=120"]
    atheris.Setup(options, lambda data: run(here, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
