# SPDX-License-Identifier: Apache-2.0
"""`pyploop migrate` in the lab, and what must be true of both hosts afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lab import container
from lab.hosts import CONTAINER_NETNS, SLOWNESS, Host, Lab
from lab.verify import Client
from support import wait_until

from pyploop.migration.source import host_rates

SECONDS = 90.0 * SLOWNESS
"""For a migration, whatever happens to it."""
_OURS = ("/srv", "/var/lib", "/run", "/dev/shm")
_STAY = {
    "/srv/criu-action",
    container.PYPLOOP_CONFIG,
    "/var/lib/pyploop",
    "/var/lib/pyploop/migrate",
    "/var/lib/pyploop/migrate/runc-ct.lazy",
    "/run/criu.kdat",
    "/run/pyploop",
    "/run/pyploop/lock",
    "/run/pyploop/lock/migration.0",
    "/run/pyploop/lock/migration.1",
    "/run/runc",
}
"""What a host may keep: the lab's files, empty folders and locks that nobody holds,
CRIU's notes about the kernel, how the memory of the container came to the host."""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    errors: str
    events: list[dict[str, Any]]

    @property
    def steps(self) -> dict[str, float]:
        """Seconds of the suspended time's steps."""
        found = [e["steps"] for e in self.events if e["event"] == "moved"]
        assert found, f"it did not move: {self.code}: {self.errors}"
        return dict(found[-1])


class Migration:
    """`pyploop migrate --live`, started on the host that has the container."""

    def __init__(
        self,
        lab: Lab,
        source: Host,
        *options: str,
        events: str = "events.ndjson",
        name: str = container.NAME,
    ) -> None:
        self.source, self.target = source, lab.other(source)
        self._events = lab.folder / events
        self._events.unlink(missing_ok=True)
        words = ["pyploop", "migrate", "--live", "-t", "--config", container.PYPLOOP_CONFIG]
        words += ["--json", str(self._events), *options, self.target.name, name]
        self._process = subprocess.Popen(
            source.command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def phase(self) -> str:
        """The last one that was announced."""
        phases = [str(e["phase"]) for e in self._read() if e["event"] == "phase"]
        return phases[-1] if phases else ""

    def events(self) -> list[dict[str, Any]]:
        """So far."""
        return self._read()

    def _read(self) -> list[dict[str, Any]]:
        if not self._events.exists():
            return []
        text = self._events.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait(self) -> Outcome:
        out, errors = self._process.communicate(timeout=SECONDS)
        return Outcome(self._process.returncode, out, errors, self._read())

    def close(self) -> None:
        """End it; nothing if it has ended."""
        if self._process.poll() is None:
            for pid, line in self.source.processes().items():
                if " migrate " in line:
                    self.source.run("kill", "-9", pid, check=False)
            self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def migration(
    lab: Lab, source: Host, *options: str, name: str = container.NAME
) -> Iterator[Migration]:
    one = Migration(lab, source, *options, name=name)
    try:
        yield one
    finally:
        one.close()


def migrate(lab: Lab, source: Host, *options: str, name: str = container.NAME) -> Outcome:
    with migration(lab, source, *options, name=name) as one:
        return one.wait()


def recover(source: Host) -> str:
    """`pyploop migrate --recover` on the source: what it said."""
    command = ["pyploop", "migrate", "--recover", "--config", container.PYPLOOP_CONFIG]
    return source.run(*command, timeout=SECONDS)


def kill(host: Host, pattern: str, how: signal.Signals = signal.SIGKILL) -> None:
    """A signal for the processes of the host whose command line has the pattern.  After
    SIGKILL they have ended when this returns: what ends with them has been told to."""
    pids = [pid for pid, line in host.processes().items() if pattern in line]
    assert pids, f"no {pattern!r} on {host.name}: {host.processes()}"
    for pid in pids:
        host.run("kill", f"-{how.value}", pid, check=False)
    if how == signal.SIGKILL:
        wait_until(lambda: not _run(host, pids), "they have ended", 20 * SLOWNESS)


def _run(host: Host, pids: list[int]) -> list[int]:
    """Those of the processes that have not ended, waited for or not."""
    found = host.processes()
    return [pid for pid in pids if "<defunct>" not in found.get(pid, "<defunct>")]


# ---- judgement


def files(host: Host) -> set[str]:
    """What lies in the host's own folders, container and lab included."""
    found = set()
    top = host.outside("/")
    for folder in _OURS:
        for where, folders, names in os.walk(host.outside(folder)):
            inside = "/" + os.path.relpath(where, top)
            found |= {f"{inside}/{name}" for name in folders + names}
            folders[:] = [d for d in folders if f"{inside}/{d}" != str(container.ROOTFS)]
    return found


def debris(host: Host, before: set[str], runs_here: bool) -> dict[str, Any]:
    """What a migration left on the host that should not be there; `before` is what
    was there before the container."""
    left: dict[str, Any] = {}
    sockets = host.run("nsenter", f"--net={CONTAINER_NETNS}", "ss", "-Htan").splitlines()
    extra = {f for f in files(host) - before - _STAY if not f.endswith(host_rates.SUFFIX)}
    processes = host.processes()
    if runs_here:
        prefixes = (str(container.BUNDLE), "/run/runc/ct")
        extra = {f for f in extra if not f.startswith(prefixes)}
        known = {str(container.BUNDLE / f) for f in ("config.json", "criu.conf", "root.img")}
        bundle = {f for f in files(host) if f.startswith(f"{container.BUNDLE}/")}
        extra |= bundle - known - {str(container.ROOTFS)}
        processes = {p: c for p, c in processes.items() if not c.startswith("/guest")}
        sockets = []
    mounts = host.mounts()
    mounted = int(runs_here and container.on_image(host))
    if mounts.count(str(container.ROOTFS)) != mounted:
        left["mounts"] = [m for m in mounts if m.startswith("/srv/")]
    if len(container.loops(host)) != mounted:
        left["loops"] = container.loops(host)
    link = "state UP" in host.run("ip", "link", "show", "ct0")
    if link != runs_here:
        left["link"] = "up" if link else "down"
    left |= {"files": sorted(extra)} if extra else {}
    left |= {"processes": processes} if processes else {}
    left |= {"sockets": sockets} if sockets else {}
    return left


def only_side(lab: Lab) -> Host:
    """The host that runs the container; the other one has none."""
    states = {h.name: container.state(h) for h in (lab.a, lab.b)}
    assert sorted(states.values()) == ["absent", "running"], states
    return lab.a if states["a"] == "running" else lab.b


DEAD_LOCK = "/run/pyploop/lock/ct.lck"
"""Of an agent that was killed before it had a record; the next one takes it over."""


def judge(lab: Lab, client: Client, before: set[str]) -> Host:
    """Everything that has to be true after each migration, failed or not: the
    container runs on exactly one host, which is returned; the connection is the
    first one; nothing acknowledged is lost; no debris beyond what was `before`."""
    side = only_side(lab)
    acknowledged = client.verify_database()
    client.verify_blocks()
    client.mark()
    assert client.verify_database() > acknowledged
    for host in (lab.other(side), side):
        deadline = time.monotonic() + 5 * SLOWNESS  # the last process may be going yet
        while (left := debris(host, before, host is side)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"left on host {host.name}: {left}"
    return side
