# SPDX-License-Identifier: Apache-2.0
"""vz.conf and CTID.conf: shell assignments, which are read and never executed.

A value that a shell would have to compute (a command substitution, an operator of a
parameter expansion) is an error only when that variable is asked for.  Lines that are not
assignments are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pyploop.errors import OpenError, ParameterError

MAX_SIZE = 1 << 20
"""Bytes of a configuration file at most; real ones have a few thousand."""
DEFAULTS = {
    "VE_ROOT": "/vz/root/$VEID",
    "VE_PRIVATE": "/vz/private/$VEID",
    "DUMPDIR": "/vz/dump",
    "LOCKDIR": "/vz/lock",
}
"""The values of vz.conf as it is installed."""

_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_NAME = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


class UnreadableValue(ValueError):
    """Only a shell could compute the value; the text says why."""


@dataclass
class VzConf:
    """The variables of one container's configuration."""

    values: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Variable -> where its value stands, and why it cannot be read."""

    def get(self, name: str) -> str | None:
        """The value; None when it is not set.  ParameterError when only a shell could
        compute it."""
        if name in self.unreadable:
            raise ParameterError(
                f"cannot read {name} in {self.unreadable[name]}; write a plain value instead"
            )
        return self.values.get(name)

    def path(self, name: str) -> str:
        """The value, which must be an absolute path."""
        value = self.get(name)
        if not value or not value.startswith("/"):
            raise ParameterError(
                f"{name} in vz.conf or the container's .conf is not an absolute path: {value!r}"
            )
        return value

    def update(self, text: str, where: str) -> None:
        """Add the assignments of one file.  A later one replaces an earlier one, and can use
        its value."""
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
                raise OpenError.of(f"cannot read {path}", e, path=str(path)) from e
            continue
        except OSError as e:
            raise OpenError.of(f"cannot read {path}", e, path=str(path)) from e
        if len(data) > MAX_SIZE:
            raise OpenError(f"{path} has more than {MAX_SIZE} bytes", path=str(path))
        conf.update(data.decode(errors="surrogateescape"), str(path))
    return conf


def _lines(text: str) -> list[tuple[int, str]]:
    """(number of its first line, text) of each logical line: lines that a backslash or an
    open quote continues are joined."""
    result: list[tuple[int, str]] = []
    so_far, first = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        so_far, first = (so_far + line, first) if so_far else (line, number)
        if so_far.endswith("\\") and not so_far.endswith("\\\\"):
            so_far = so_far[:-1] or " "
            continue
        if _open_quote(so_far):
            so_far += "\n"
            continue
        result.append((first, so_far))
        so_far = ""
    if so_far:
        result.append((first, so_far))
    return result


def _open_quote(line: str) -> bool:
    """Whether the line is an assignment with a quote that is not closed in it."""
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
    """The parts of the first word, without quotes: (text, whether variables in it are
    expanded)."""
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
        raise UnreadableValue(f"{text[at:].strip()[:40]!r} follows the value")
    return parts


def _double(text: str, at: int, parts: list[tuple[str, bool]]) -> int:
    """Add the parts of the double-quoted string that begins at `at`.  Returns the position
    behind it."""
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
        raise UnreadableValue("a command would give the value, and no command is run")
    result = _NAME.sub(lambda m: known.get(m[1] or m[2], ""), text)
    left = _NAME.sub("", text)
    if re.search(r"\$[{0-9@*#?$!-]", left):
        raise UnreadableValue(f"only a shell can expand {text!r}")
    return result
