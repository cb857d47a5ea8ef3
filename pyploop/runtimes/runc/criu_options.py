# SPDX-License-Identifier: Apache-2.0
"""CRIU's options that a user has set for a container: in the file that the annotation
org.criu.config names, or else in /etc/criu/runc.conf, as runc reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.runc.preflight import CriuOptions
from pyploop.system.commands import run

OF_THE_HOST = "/etc/criu/runc.conf"
_SIZE = re.compile(r"(\d+)([KMG]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LINE = re.compile(r"\s*(?:--)?([a-z][a-z0-9-]*)(?:[\s=]+(.*?))?\s*(?:#.*)?")
_MOVED = {
    "ghost-limit": _SIZE,
    "ext-unix-sk": re.compile(""),
}
"""Options that go along with the container, and the values that a target accepts."""
TIMEOUT = 30.0


def file_of(config: Mapping[str, Any]) -> str:
    """The file that counts for a container with this config.json; empty: there is none."""
    named = (config.get("annotations") or {}).get("org.criu.config")
    if named:
        return str(named)
    return OF_THE_HOST if Path(OF_THE_HOST).exists() else ""


def read(path: str) -> dict[str, str]:
    """Option -> its value, or nothing for one without a value."""
    try:
        text = Path(path).read_text(errors="replace") if path else ""
    except OSError:
        return {}
    return parse(text.splitlines())


def parse(lines: Iterable[str]) -> dict[str, str]:
    found = {}
    for line in lines:
        if match := _LINE.fullmatch(line):
            found[match[1]] = (match[2] or "").strip('"')
    return found


def of_dump(path: str, runc_options: Iterable[str], more: Iterable[str]) -> CriuOptions:
    """What counts for the checks.  path: as of `file_of`.  runc_options: of the command line.
    more: lines that the file gets before the dump."""
    found = parse(more) | read(path) | parse(runc_options)
    limit = _SIZE.fullmatch(found.get("ghost-limit", ""))
    size = int(limit[1]) * _UNITS[limit[2].upper()] if limit else CriuOptions.ghost_limit
    return CriuOptions(size, "ext-unix-sk" in found, path)


def told(path: str, ours: Iterable[str]) -> list[str]:
    """The lines that the other host should have, too.  ours: of migrate.toml."""
    found = parse(ours) | read(path)
    return [_line(name, found[name]) for name in _MOVED if name in found]


def merged(theirs: Any, ours: Iterable[str]) -> list[str]:
    """The lines on the target.  theirs: as the source has told; only options that cannot harm
    this host are taken.  ours: of migrate.toml, which win."""
    accepted = {}
    for name, value in parse(str(x) for x in theirs or ()).items():
        if name in _MOVED and _MOVED[name].fullmatch(value):
            accepted[name] = value
    return [_line(name, value) for name, value in (accepted | parse(ours)).items()]


def complete(path: str, lines: Iterable[str]) -> None:
    """Add to CRIU's options those lines of migrate.toml that are not set there.  The file is one
    that pyploop has written; nothing happens when it is not there."""
    there = read(path)
    new = [_line(n, v) for n, v in parse(lines).items() if n not in there]
    if new and Path(path).exists():
        with open(path, "a") as f:
            f.write("".join(f"{line}\n" for line in new))


def _line(name: str, value: str) -> str:
    return f"{name} {value}".rstrip()


def check_runc(runc: str, command: str, options: Iterable[str]) -> None:
    """MigrateError(15) when `runc COMMAND` does not know one of the options."""
    text = run([runc, command, "--help"], VzExitCode.BAD_CONFIG, TIMEOUT)
    known = set(re.findall(r"--[a-z][a-z0-9-]*", text))
    names = [o.partition("=")[0] for o in options if o.startswith("--")]
    if unknown := [n for n in names if n not in known]:
        raise MigrateError(
            VzExitCode.BAD_CONFIG,
            f"runc {command} of this host does not know {', '.join(unknown)} (options in "
            "migrate.toml)",
            hint="remove it there, or set it as an option of CRIU (criu_options in migrate.toml)",
        )
