# SPDX-License-Identifier: Apache-2.0
"""vz.conf and CTID.conf: shell assignments, read and never executed.

What a shell would have to compute (a command substitution, an operator of a
parameter expansion) is an error of the one who asks for that variable, not of
those who do not; other lines than assignments are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pyploop.errors import OpenError, ParameterError

MAX_SIZE = 1 << 20
"""Bytes of a configuration file: real ones have a few thousand."""
DEFAULTS = {
    "VE_ROOT": "/vz/root/$VEID",
    "VE_PRIVATE": "/vz/private/$VEID",
    "DUMPDIR": "/vz/dump",
    "LOCKDIR": "/vz/lock",
}
"""What vz.conf has as it is installed."""

_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_NAME = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


class UnreadableValue(ValueError):
    """Only a shell could tell what the value is; the text says why."""


@dataclass
class VzConf:
    """The variables of one container's configuration."""

    values: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Variable -> where and why it cannot be read."""

    def get(self, name: str) -> str | None:
        """The value, None when it is not set; ParameterError when it cannot be
        read without executing the file."""
        if name in self.unreadable:
            raise ParameterError(f"{name} in {self.unreadable[name]}; write it out")
        return self.values.get(name)

    def path(self, name: str) -> str:
        """The value, which must be an absolute path."""
        value = self.get(name)
        if not value or not value.startswith("/"):
            raise ParameterError(f"{name} in the vz configuration is no absolute path: {value!r}")
        return value

    def update(self, text: str, where: str) -> None:
        """Add the assignments of one file; later ones win, and see earlier ones."""
        for number, line in _lines(text):
            m = _ASSIGNMENT.fullmatch(line)
            if not m:
                continue
            name = m[1]
            try:
                value = _value(m[2], self.values)
            except UnreadableValue as e:
                self.values.pop(name, None)
                self.unreadable[name] = f"{where}, line {number}: {e}"
                continue
            self.unreadable.pop(name, None)
            self.values[name] = value


def load(ctid: str, etc: Path = Path("/etc/vz")) -> VzConf:
    """The configuration of one container: defaults, ETC/vz.conf, ETC/conf/CTID.conf.
    OpenError when vz.conf cannot be read; the container's own file may be missing."""
    conf = VzConf({"VEID": ctid})
    conf.update("\n".join(f'{k}="{v}"' for k, v in DEFAULTS.items()), "the defaults")
    for path, needed in ((etc / "vz.conf", True), (etc / "conf" / f"{ctid}.conf", False)):
        try:
            with path.open("rb") as f:
                data = f.read(MAX_SIZE + 1)
        except FileNotFoundError as e:
            if needed:
                raise OpenError.of(f"cannot read {path}", e) from e
            continue
        except OSError as e:
            raise OpenError.of(f"cannot read {path}", e) from e
        if len(data) > MAX_SIZE:
            raise OpenError(f"{path} is larger than {MAX_SIZE} bytes")
        conf.update(data.decode(errors="surrogateescape"), str(path))
    return conf


def _lines(text: str) -> list[tuple[int, str]]:
    """(number of the first, text) of each line, those that a backslash or an
    open quote continues joined."""
    result: list[tuple[int, str]] = []
    held, first = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        held, first = (held + line, first) if held else (line, number)
        if held.endswith("\\") and not held.endswith("\\\\"):
            held = held[:-1] or " "
            continue
        if _open_quote(held):
            held += "\n"
            continue
        result.append((first, held))
        held = ""
    if held:
        result.append((first, held))
    return result


def _open_quote(line: str) -> bool:
    """The line is an assignment whose quotes do not close in it."""
    m = _ASSIGNMENT.fullmatch(line)
    if not m:
        return False
    try:
        _words(m[2])
    except UnreadableValue as e:
        return str(e) == _UNCLOSED
    return False


_UNCLOSED = "a quote is not closed"


def _words(text: str) -> list[tuple[str, bool]]:
    """The parts of the first word, as (text, expand) with the quotes gone."""
    parts: list[tuple[str, bool]] = []
    at = 0
    while at < len(text):
        c = text[at]
        if c in " \t\n;&|<>()":
            break
        if c == "'":
            end = text.find("'", at + 1)
            if end < 0:
                raise UnreadableValue(_UNCLOSED)
            parts.append((text[at + 1 : end], False))
            at = end + 1
        elif c == '"':
            at = _double(text, at + 1, parts)
        elif c == "\\":
            parts.append((text[at + 1 : at + 2], False))
            at += 2
        else:
            end = at + 1
            while end < len(text) and text[end] not in " \t\n;&|<>()'\"\\":
                end += 1
            parts.append((text[at:end], True))
            at = end
    if text[at:].lstrip() and not re.match(r"\s*(#|;|$)|\s+#", text[at:]):
        # NAME=value command: the assignment is for that command only.
        raise UnreadableValue(f"{text[at:].strip()[:40]!r} stands behind the value")
    return parts


def _double(text: str, at: int, parts: list[tuple[str, bool]]) -> int:
    """The parts of a double-quoted string that begins at `at`; returns the
    position behind it."""
    plain = ""
    while at < len(text):
        c = text[at]
        if c == '"':
            parts.append((plain, True))
            return at + 1
        if c == "\\" and text[at + 1 : at + 2] in ('"', "\\", "$", "`"):
            parts += [(plain, True), (text[at + 1], False)]
            plain = ""
            at += 2
            continue
        plain += c
        at += 1
    raise UnreadableValue(_UNCLOSED)


def _value(text: str, known: Mapping[str, str]) -> str:
    return "".join(_expand(part, known) if expand else part for part, expand in _words(text))


def _expand(text: str, known: Mapping[str, str]) -> str:
    if "`" in text or "$(" in text:
        raise UnreadableValue("a command gives the value, and nothing here is executed")
    result = _NAME.sub(lambda m: known.get(m[1] or m[2], ""), text)
    left = _NAME.sub("", text)
    if re.search(r"\$[{0-9@*#?$!-]", left):
        raise UnreadableValue(f"only a shell can expand {text!r}")
    return result
