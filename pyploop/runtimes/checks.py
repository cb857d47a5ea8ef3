# SPDX-License-Identifier: Apache-2.0
"""The checks before a migration.  Each has a stable name, and all that fail are reported, not
only the first (docs/reference/checks.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyploop.errors import MigrateError, one_line


@dataclass(frozen=True)
class Check:
    """What a check looks at."""

    where: str
    """`source`, `target` or `both`."""
    live: bool
    """Only a live migration needs it."""
    what: str
    """What must be so."""


CHECKS: dict[str, Check] = {
    "other": Check("both", False, "what vzctl, configured commands or an older agent check"),
    "config-json": Check("source", False, "`config.json` can be read"),
    "config-host": Check("both", False, "`config.json` needs nothing that only the source has"),
    "network-namespace": Check("source", False, "the container has a network namespace"),
    "places": Check(
        "source", False, "the disks and trees are what `migrate.toml` names, and are mounted"
    ),
    "mounts": Check(
        "source", False, "the root and each mount of `config.json` is migrated, or external"
    ),
    "root": Check("source", False, "the processes have the root that `config.json` names"),
    "criu": Check("both", True, "CRIU is new enough, and works on this kernel"),
    "freezer": Check("source", True, "the container has a freezer cgroup"),
    "images-room": Check("both", True, "`images_dir` has room for the memory images"),
    "stopped": Check("source", True, "no process is stopped by a signal, or traced"),
    "processes": Check("source", True, "all processes descend from the first, in one cgroup"),
    "mounted": Check("source", True, "all that is mounted in the container is migrated"),
    "io-uring": Check("source", True, "no process uses io_uring"),
    "bpf": Check("source", True, "no process has BPF programs, links, or maps that CRIU refuses"),
    "userfaultfd": Check("source", True, "no process has a userfaultfd"),
    "anonymous-file": Check(
        "source", True, "no process has another anonymous file that CRIU does not know"
    ),
    "packet-pipe": Check("source", True, "no process has a pipe of packets (O_DIRECT)"),
    "memfd-secret": Check("source", True, "no process has secret memory"),
    "posix-queues": Check("source", True, "no process has a POSIX message queue open"),
    "outside-file": Check("source", True, "each open file lies on a mount of the container"),
    "outside-terminal": Check("source", True, "no process has a terminal of the host"),
    "deleted-file-linked": Check("source", True, "no deleted file in use has another name"),
    "deleted-file-size": Check(
        "source", True, "no deleted file in use is larger than CRIU's `ghost-limit` (1 MiB)"
    ),
    "vsock": Check("source", True, "no process has a vsock"),
    "socket-family": Check("source", True, "all sockets are of families that CRIU knows"),
    "socket-protocol": Check("source", True, "all sockets are of protocols that CRIU knows"),
    "mptcp": Check("source", True, "no process uses MPTCP"),
    "netlink-data": Check("source", True, "no netlink socket has data that are not read"),
    "netlink-link-events": Check(
        "source", True, "with `link_down`: no netlink socket waits for events of links"
    ),
    "outside-socket": Check(
        "source",
        True,
        "all sockets were made in the container, as was the other end of each Unix socket",
    ),
    "nested-pid-namespace": Check("source", True, "all processes are in one pid namespace"),
    "nested-time-namespace": Check("source", True, "all processes are in one time namespace"),
    "nested-user-namespace": Check("source", True, "all processes are in one user namespace"),
    "nested-uts-namespace": Check("source", True, "all processes are in one namespace of names"),
    "nested-ipc-namespace": Check("source", True, "all processes are in one IPC namespace"),
    "nested-network-namespace": Check("source", True, "all processes are in one network"),
    "nested-cgroup-namespace": Check("source", True, "all processes are in one cgroup namespace"),
    "user-namespace-network": Check(
        "source", True, "the network namespace belongs to the container's user namespace"
    ),
    "submount": Check(
        "source", True, "nothing of the host is mounted below a bind of `config.json`"
    ),
    "runc-options": Check("both", True, "runc knows the `options` of `migrate.toml`"),
    "ext4-mmp": Check(
        "source", True, "the target mounts disks with ext4's multiple mount protection at once"
    ),
    "immutable-files": Check("source", False, "no file of a tree is immutable or append-only"),
    "tree": Check("source", False, "the trees can be copied, and rsync is installed"),
    "disk": Check("source", False, "the disks can be opened"),
    "connection": Check("source", False, "there is an agent on the target"),
    "agent-version": Check("source", False, "the target's pyploop can do what is needed"),
    "forecast": Check("source", True, "the suspended time is as `--max-suspend` allows"),
    "trust": Check("target", True, "the target restores memory from this source"),
    "lock": Check("target", False, "no other migration of the container is under way"),
    "machine": Check("target", False, "both hosts have the same kind of machine"),
    "cpu": Check("target", True, "the target's CPU has all features of the source's"),
    "exists": Check("target", False, "the target has no container and no bundle of this name"),
    "same-places": Check("target", False, "both hosts name the same number of disks and trees"),
    "policy": Check("target", False, "the target's policy allows what `config.json` asks for"),
    "external": Check("target", False, "each external path is there, and of the same kind"),
    "private": Check("target", False, "no other user of the target can reach the files"),
    "busy": Check("target", True, "no earlier restore of the container still loads memory"),
    "cgroups": Check("target", True, "the target has the cgroup version and controllers"),
    "lsm": Check("target", True, "the target has loaded the AppArmor profiles of the processes"),
    "seccomp": Check("target", True, "the target's kernel has the actions of the seccomp filters"),
    "file-system": Check("target", False, "the target's kernel has the file system of each disk"),
    "disk-room": Check("target", False, "there is room for the disks, and nothing in their place"),
    "tree-room": Check("target", False, "there is room for the trees, and nothing in their place"),
    "limits": Check(
        "both", True, "root can read the processes' limits, and set them on the target"
    ),
    "podman": Check("both", False, "Podman answers"),
    "podman-rootless": Check("both", False, "it is root's Podman"),
    "podman-version": Check(
        "both", False, "Podman is new enough, on the target no older than on the source"
    ),
    "podman-storage": Check(
        "both", False, "Podman stores containers with the driver overlay, in the same places"
    ),
    "podman-cgroups": Check("target", False, "both hosts' Podman makes cgroups in the same way"),
    "podman-runtime": Check("both", False, "the container is run by runc, and the host has runc"),
    "podman-running": Check("source", False, "the container runs"),
    "podman-pod": Check(
        "source",
        False,
        "the container is in no pod, or the whole pod moves and can be made again on the target",
    ),
    "podman-dependencies": Check(
        "source", False, "the container shares nothing with another container"
    ),
    "podman-privileged": Check("source", False, "the container is not privileged"),
    "podman-users": Check("source", False, "the container has no user namespace"),
    "podman-namespaces": Check(
        "source", False, "the container has pid, IPC and host name to itself"
    ),
    "podman-mount": Check("source", False, "no overlay and no image is mounted in the container"),
    "podman-rm": Check(
        "source", False, "a container that was started with `--rm` moves with `--live` and `-r yes`"
    ),
    "podman-systemd": Check(
        "both",
        False,
        "no systemd unit makes the container, and the target has none of the name of one that "
        "starts it",
    ),
    "podman-root": Check("source", False, "the container's root is an image of Podman's storage"),
    "podman-volume": Check(
        "both",
        False,
        "each volume is a plain folder that no other container uses, and the target has none of "
        "its name",
    ),
    "podman-bind": Check("source", False, "each bind mount moves, or is external (`[podman]`)"),
    "podman-shared": Check(
        "source", False, "no other container uses a volume or a bind mount that moves"
    ),
    "podman-link": Check("source", True, "each of the container's links is a veth"),
    "podman-description": Check("both", False, "Podman describes the container"),
    "podman-network": Check(
        "target", False, "Podman has the networks, and their addresses are free"
    ),
    "podman-nft": Check("target", True, "nft is installed, if the container has a network"),
    "podman-secret": Check("target", False, "Podman has the container's secrets"),
    "podman-log": Check("target", False, "the container's log driver works"),
    "podman-port": Check("target", False, "the published ports are free"),
}
"""By name.  A name stays the same in later versions."""


@dataclass(frozen=True)
class Failed:
    """A check that failed."""

    name: str
    code: int
    """A VzExitCode."""
    message: str
    """What was found, on which process, descriptor or path."""
    hint: str = ""
    """The cure, unless the message says it."""
    host: str = ""
    """Where; empty: on this host."""
    path: str | None = None
    """See PyploopError."""

    def error(self) -> MigrateError:
        """As the only failure.  The host's words are marked as its own: it may be hostile."""
        host = f"{self.host}: " if self.host else ""
        hint = f"{host}{self.hint}" if self.hint else None
        return MigrateError(self.code, f"{host}{self.message}", path=self.path, hint=hint)


class ChecksFailedError(MigrateError):
    """Checks have failed, and nothing was started.  One failure keeps its own words; several
    are reported one by one, as events."""

    def __init__(self, failed: Sequence[Failed], facts: dict[str, Any] | None = None) -> None:
        """failed: in the order of the checks, at least one; the exit code is that of the first.
        facts: those of the source, if the target can check with them all the same."""
        first = failed[0].error()
        text, hint = f"{first} (check {failed[0].name})", first.hint
        if len(failed) > 1:
            names = dict.fromkeys(f.name for f in failed)
            text, hint = f"{len(failed)} checks failed: {', '.join(names)}", None
        super().__init__(first.exit_code, text, path=first.path, hint=hint)
        self.failed = tuple(failed)
        self.facts = facts

    def told(self) -> list[dict[str, Any]]:
        """For the other host.  JSON."""
        return [
            {"name": f.name, "code": f.code, "message": f.message, "hint": f.hint}
            for f in self.failed
        ]


class Checks:
    """Collects the checks that fail."""

    def __init__(self) -> None:
        self.failed: list[Failed] = []

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """A failure in the body is one of this check, and the next check may begin."""
        assert name in CHECKS, name
        try:
            yield
        except MigrateError as e:
            self.failed += of(e, name)

    def has(self, name: str) -> bool:
        return any(f.name == name for f in self.failed)

    def end(self, facts: dict[str, Any] | None = None) -> None:
        """ChecksFailedError when one has failed."""
        if self.failed:
            raise ChecksFailedError(self.failed, facts)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """ChecksFailedError for a failure in the body: the check of this name."""
    found = Checks()
    with found.named(name):
        yield
    found.end()


def of(error: MigrateError, name: str) -> list[Failed]:
    """The failed checks of an error; one that has no names is that of the check `name`."""
    if isinstance(error, ChecksFailedError):
        return list(error.failed)
    return [Failed(name, error.exit_code, str(error), one_line(error.hint or ""), path=error.path)]


def table() -> str:
    """The Markdown table of docs/reference/checks.md."""
    lines = ["| check | where | migration | what must be so |", "| --- | --- | --- | --- |"]
    for name, check in CHECKS.items():
        kind = "live" if check.live else "any"
        lines.append(f"| `{name}` | {check.where} | {kind} | {check.what} |")
    return "\n".join(lines) + "\n"
