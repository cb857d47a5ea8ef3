# SPDX-License-Identifier: Apache-2.0
"""`pyploop trust`: [trust] of migrate.toml, read and changed.

Only the line of one key is written anew, so that comments and all else stay as their author
wrote them.  What the new text says is compared with what it should say before it is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

from pyploop.errors import MigrateError, OpenError, VzExitCode
from pyploop.runtimes import config, policy
from pyploop.runtimes.config import HostConfig
from pyploop.system import private_folder

FIRST = """\
# How containers look on this host, and who may send some here (migrate.toml(5)).
"""
_HEADER = re.compile(r"\s*\[\s*trust\s*\]\s*(#.*)?")
_SECTION = re.compile(r"\s*\[")


def edited(text: str, key: str, values: Iterable[str]) -> str:
    """The file's text with this list as the value of the key in [trust].  ValueError: that
    cannot be done by changing one line."""
    wanted = tomllib.loads(text)
    trust = wanted.setdefault("trust", {})
    if not isinstance(trust, dict):
        raise ValueError("trust is not a table")
    trust[key] = [*values]
    line = f"{key} = {json.dumps(trust[key], ensure_ascii=False)}"
    made = _with_line(text, key, line)
    try:
        right = tomllib.loads(made) == wanted
    except tomllib.TOMLDecodeError:
        right = False
    if not right:
        raise ValueError(f"{key} does not stand on one line below [trust]")
    return made


def _with_line(text: str, key: str, line: str) -> str:
    lines = text.splitlines()
    headers = [n for n, one in enumerate(lines) if _HEADER.fullmatch(one)]
    if not headers:
        return "\n".join([*lines, *([""] if lines else []), "[trust]", line, ""])
    first = headers[0] + 1
    known = re.compile(rf"(\s*){key}\s*=\s*\[[^\]]*\](\s*(#.*)?)")
    for n in range(first, len(lines)):
        if found := known.fullmatch(lines[n]):
            lines[n] = f"{found[1]}{line}{found[2]}"
            break
        if _SECTION.match(lines[n]):
            lines.insert(first, line)
            break
    else:
        lines.insert(first, line)
    return "\n".join([*lines, ""])


def change(
    file: str | None, changes: dict[str, Callable[[tuple[str, ...]], Iterable[str]]]
) -> tuple[HostConfig, HostConfig]:
    """Change these keys of [trust]: each from its old list to a new one.  Returns the
    configuration before and after.  MigrateError(1) says why the file stays as it is."""
    path = Path(file or config.DEFAULT)
    try:
        if file is None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path.parent, 0o755)
        path = Path(os.path.realpath(path))
        with private_folder.opened(path.parent) as folder, private_folder.alone(folder):
            before = config.load(file) if file is None or path.exists() else HostConfig()
            text, mode = FIRST, 0o644
            if before.path is not None:
                text = private_folder.read(folder, path.name).decode()
                mode = stat.S_IMODE(os.stat(path.name, dir_fd=folder).st_mode)
            made = text
            for key, of in changes.items():
                old = before.trusted_live if key == "live" else before.trusted_places
                if (new := [*of(old)]) != [*old]:
                    made = edited(made, key, new)
            after = config.parse(tomllib.loads(made), str(path))
            if made != text:
                private_folder.replace(folder, path.name, made.encode(), durable=True)
                os.chmod(path.name, mode, dir_fd=folder)
    except OpenError as e:
        raise MigrateError(VzExitCode.USAGE, str(e), path=str(path), hint=e.hint) from e
    except OSError as e:
        raise MigrateError(
            VzExitCode.USAGE, f"cannot change {path}: {e.strerror}", path=str(path)
        ) from e
    except ValueError as e:
        raise MigrateError(
            VzExitCode.USAGE,
            f"cannot change {path}, because {e}: it stays as it is",
            path=str(path),
            hint="edit it; migrate.toml(5) has an example",
        ) from e
    return before, after


def is_address(entry: str) -> bool:
    """Whether it is an address or a network, not the name of a key."""
    return policy.network(entry) is not None
