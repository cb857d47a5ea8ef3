# SPDX-License-Identifier: Apache-2.0
"""The options for rsync that a user may add (--rsync).  None of them leaves files out,
changes what arrives or where, or runs a command."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pyploop.errors import MigrateError, VzExitCode

_LETTERS = re.compile(r"-[aHAXSxrlptgoDzWc]+")
_ALONE = frozenset(
    (
        *("--archive", "--recursive", "--links", "--perms", "--times", "--group", "--owner"),
        *("--devices", "--specials", "--hard-links", "--acls", "--xattrs", "--sparse"),
        *("--numeric-ids", "--one-file-system", "--delete", "--delete-during"),
        *("--compress", "--new-compress", "--old-compress"),
        *("--checksum", "--whole-file", "--no-whole-file"),
    )
)
_VALUED = frozenset(
    (
        *("--bwlimit", "--block-size", "--checksum-choice", "--cc"),
        *("--compress-level", "--zl", "--compress-choice", "--zc", "--skip-compress"),
    )
)

_CHECKSUM = ("--checksum-choice", "--cc")


def check_options(words: Sequence[str]) -> tuple[str, ...]:
    """The user's options, with values joined to their names.  MigrateError(1) for an option
    that is not allowed."""
    result: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word.startswith("-B"):
            word = "--block-size" + (f"={word[2:].removeprefix('=')}" if len(word) > 2 else "")
        name, equals, _ = word.partition("=")
        if name in _VALUED:
            if not equals:
                if not left:
                    raise MigrateError(
                        VzExitCode.USAGE, f"--rsync: the option {word} needs a value"
                    )
                word = f"{word}={left.pop(0)}"
            value = word.partition("=")[2]
            if name in _CHECKSUM and "none" in value.split(","):  # it would compare nothing
                raise MigrateError(
                    VzExitCode.USAGE,
                    f"--rsync: {word} is not allowed, because files are compared by checksum",
                )
        elif word not in _ALONE and not _LETTERS.fullmatch(word):
            raise MigrateError(
                VzExitCode.USAGE,
                f"--rsync: {word} is not allowed; only options for compression, speed and "
                f"comparison are: {', '.join(sorted(_VALUED | {'-z', '-W', '-c'}))}",
            )
        result.append(word)
    return tuple(result)
