# SPDX-License-Identifier: Apache-2.0
"""systemd units that start a container of Podman (`podman generate systemd --name`), and the
timer of its health check.

A unit runs commands as root.  So the target takes it only if each line is one that `podman
generate systemd` writes for this container.  It is installed and enabled after the commit, and
disabled on the source before the container is ended there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyploop.errors import MigrateError, VzExitCode
from pyploop.runtimes.podman.command import Podman
from pyploop.system.commands import Command, run

FOLDER = Path("/etc/systemd/system")
"""The standard place of an administrator's units."""
_OTHERS = tuple(map(Path, ("/run/systemd/system", "/usr/lib/systemd/system")))
RUNNING = Path("/run/systemd/system")
"""There while systemd is the host's process 1 (sd_booted(3))."""
LARGEST = 1 << 14
"""Bytes of a unit."""
MOST = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,200}\.service")
_LINES = {
    "Description": r"[^%]*",
    "Documentation": r"[^%]*",
    "Wants": r"network(-online)?\.target",
    "After": r"[\w.:@ -]+",
    "Before": r"[\w.:@ -]+",
    "RequiresMountsFor": r"[\w/.-]+",
    "StartLimitIntervalSec": r"\w+",
    "StartLimitBurst": r"\d+",
    "Environment": r"PODMAN_SYSTEMD_UNIT=%n",
    "Restart": r"[a-z-]+",
    "RestartSec": r"\w+",
    "TimeoutStartSec": r"\w+",
    "TimeoutStopSec": r"\w+",
    "ExecStart": r"/usr/bin/podman start {container}",
    "ExecStop": r"/usr/bin/podman stop (-t \d+ )?{container}",
    "ExecStopPost": r"/usr/bin/podman stop (-t \d+ )?{container}",
    "PIDFile": r"/[\w/.-]+/overlay-containers/{id}/userdata/conmon\.pid",
    "Type": r"forking",
    "WantedBy": r"(multi-user|default)\.target",
}
"""What `podman generate systemd --name` writes: key -> value.  The commands' own options and
other keys could do anything."""


@dataclass(frozen=True)
class Unit:
    """A unit that starts the container."""

    name: str
    text: str
    """Empty: it stays on its host."""
    enabled: bool = False
    active: bool = False
    why: str = ""
    """Why it stays."""

    def sent(self) -> dict[str, Any]:
        """For the source facts and for the journal."""
        return asdict(self)


def parse(sent: Any) -> Unit:
    """A unit of a journal."""
    return Unit(**sent)


# ---- on the source


def find(timeout: float, container: str, name: str) -> list[Unit]:
    """The units in the standard place that start the container.  timeout: seconds for each
    command.  container: its ID."""
    starts = re.compile(
        rf"^Exec\w+=\S*podman (?:.* )?({re.escape(name)}|{container[:12]}\w*)$", re.M
    )
    found = []
    for path in sorted(FOLDER.glob("*.service")):
        text = _read(path)
        if text and _NAME.fullmatch(path.name) and starts.search(_joined(text)):
            why = why_not(text, container, name)
            if path.with_name(f"{path.name}.d").exists():
                why = f"{path.name}.d adds to it"
            enabled = _says(timeout, "is-enabled", path.name) == "enabled"
            active = RUNNING.is_dir() and _says(timeout, "is-active", path.name) == "active"
            found.append(Unit(path.name, "" if why else text, enabled, active, why))
    return found


def _read(path: Path) -> str:
    """Empty for what is no unit's text."""
    try:
        if path.is_symlink() or path.stat().st_size > LARGEST:
            return ""
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _joined(text: str) -> str:
    """A line that goes on in the next one is one line."""
    return re.sub(r"[ \t]*\\\n[ \t]*", " ", text)


def why_not(text: str, container: str, name: str) -> str:
    """Why a unit does not move; empty: it does.  container: its ID."""
    own = {"container": f"({re.escape(name)}|{container})", "id": container}
    for line in map(str.strip, _joined(text).split("\n")):
        key, equals, value = line.partition("=")
        if not line or line[0] in "#;" or line in ("[Unit]", "[Service]", "[Install]"):
            continue
        pattern = _LINES.get(key, "") if equals else ""
        for word, meaning in own.items():
            pattern = pattern.replace(f"{{{word}}}", meaning)
        if not pattern or not re.fullmatch(pattern, value):
            return f"it has the line {line[:120]!r}, which `podman generate systemd` does not write"
    return ""


def release(units: Sequence[Unit], timeout: float) -> None:
    """The container runs on another host: do not start it here at the next boot.
    MigrateError(8)."""
    for unit in units:
        if (FOLDER / unit.name).exists():
            _systemctl(timeout, "disable", unit.name)
            if RUNNING.is_dir():
                # It stops the container, too, but gives it time.  Nobody waits for that.
                _systemctl(timeout, "stop", "--no-block", unit.name)


def stop(units: Sequence[Unit], timeout: float) -> None:
    """Those that run, so that systemd does not start the container again.  MigrateError(8)."""
    for unit in _active(units):
        _systemctl(timeout, "stop", unit.name)


def start(units: Sequence[Unit], timeout: float) -> None:
    """Those that ran, after `stop`.  The container runs.  MigrateError(8)."""
    for unit in _active(units):
        _systemctl(timeout, "start", unit.name)


def _active(units: Sequence[Unit]) -> Iterator[Unit]:
    for unit in units:
        if unit.active and RUNNING.is_dir() and (FOLDER / unit.name).exists():
            yield unit


def remove(units: Sequence[Unit], timeout: float) -> None:
    """Of those that have moved, the files.  MigrateError(8)."""
    for unit in units:
        if unit.text:
            (FOLDER / unit.name).unlink(missing_ok=True)
    _reload(timeout)


# ---- on the target


def coming(sent: Any, container: str, name: str) -> list[Unit]:
    """What the source says of the units.  ValueError, KeyError, TypeError."""
    units = []
    for one in list(sent)[:MOST]:
        unit = Unit(str(one["name"]), str(one["text"]), bool(one["enabled"]), bool(one["active"]))
        if not unit.text:
            continue
        if not _NAME.fullmatch(unit.name) or len(unit.text) > LARGEST:
            raise ValueError(f"{unit.name[:80]!r} is not the name of a unit, or it is too long")
        if why := why_not(unit.text, container, name):
            raise ValueError(f"the unit {unit.name}: {why}")
        units.append(unit)
    return units


def check(units: Sequence[Unit]) -> None:
    """MigrateError(9) when there is one of that name."""
    for unit in units:
        for folder in (FOLDER, *_OTHERS):
            if os.path.lexists(folder / unit.name):
                raise MigrateError(
                    VzExitCode.EXISTS,
                    f"this host has a systemd unit {folder / unit.name} already, and the "
                    "container's has the same name",
                    hint="remove or rename it on one of the hosts",
                )


def install(units: Sequence[Unit], timeout: float) -> None:
    """The container runs here.  It may be repeated.  MigrateError(8), OSError."""
    for unit in units:
        FOLDER.mkdir(parents=True, exist_ok=True)
        new = FOLDER / f"{unit.name}.pyploop-new"
        new.write_text(unit.text)
        new.chmod(0o644)
        os.replace(new, FOLDER / unit.name)
    _reload(timeout)
    for unit in units:
        if unit.enabled:
            _systemctl(timeout, "enable", unit.name)
    start(units, timeout)


def watch_health(podman: Podman, container: str, interval: float) -> None:
    """Podman makes the timer of a health check when it starts a container, and not when it
    restores one.  This is the same timer.  MigrateError(8)."""
    if not RUNNING.is_dir():
        return
    timeout = podman.timeout
    if _says(timeout, "list-timers", "--all", "--plain", "--no-legend", f"{container}*"):
        return  # a Podman that makes it at a restore, too
    words = ["systemd-run", "--unit", container, f"--on-unit-inactive={interval:g}s"]
    words += ["--timer-property=AccuracySec=1s", f"--setenv=PATH={os.environ.get('PATH', '')}"]
    program = shutil.which(podman.program) or podman.program
    run([*words, program, "healthcheck", "run", container], VzExitCode.DUMP_FAILED, timeout)
    _systemctl(timeout, "start", "--no-block", f"{container}.service")


def interval_of(config: Mapping[str, Any]) -> float:
    """Seconds between two health checks, of Podman's own description; 0: there are none."""
    check = config.get("healthcheck") or {}
    return int(check.get("Interval") or 0) / 1e9 if check.get("Test") not in (None, ["NONE"]) else 0


# ---- systemctl


def _reload(timeout: float) -> None:
    if RUNNING.is_dir():
        _systemctl(timeout, "daemon-reload")


def _says(timeout: float, *words: str) -> str:
    """Its answer, whatever its exit status is; empty without a systemctl."""
    try:
        return Command(["systemctl", *words]).wait(timeout)[1].strip()
    except OSError:
        return ""


def _systemctl(timeout: float, *words: str) -> None:
    run(["systemctl", *words], VzExitCode.DUMP_FAILED, timeout)
