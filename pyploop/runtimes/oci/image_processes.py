# SPDX-License-Identifier: Apache-2.0
"""The processes of a dump: their namespaces, credentials and seccomp filters, against
config.json.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from pyploop.runtimes.oci.image_files import Images
from pyploop.wire import criu
from pyploop.wire.criu import Core, Creds, Inventory, Seccomp, Task, Thread
from pyploop.wire.protobuf import Message

_REALTIME = (1, 2, 6)
"""SCHED_FIFO, SCHED_RR, SCHED_DEADLINE."""
_TSYNC = 1  # SECCOMP_FILTER_FLAG_TSYNC
_SETS = {
    "bounding": Creds.BOUNDING,
    "permitted": Creds.PERMITTED,
    "effective": Creds.EFFECTIVE,
    "inheritable": Creds.INHERITABLE,
    "ambient": Creds.AMBIENT,
}


class Processes:
    """What the processes of the images may do, against what config.json gives them."""

    def __init__(self, images: Images, config: dict[str, Any], labels: Collection[str]) -> None:
        self._images, self._labels_allowed = images, labels
        self._linux, self._process = config["linux"], config["process"]
        self._kinds = {n["type"] for n in self._linux["namespaces"]}
        self._caps = {k: _bits(v) for k, v in self._process["capabilities"].items()}
        self._leaders: dict[str, int] = {}
        """Image of a thread -> the process, without the image of each process's first thread."""
        self._for_all: dict[int, bool] = {}
        """Process -> whether its seccomp filter is for all its threads."""
        self._any_cap = 0
        for bits in self._caps.values():
            self._any_cap |= bits

    def check_ids(self, names: dict[str, str]) -> None:
        """Each process has its image, and lies in namespaces of its own.  names: all images
        of the dump."""
        inventory = self._images.only("inventory.img", "inventory")
        host = inventory.message(Inventory.ROOT_IDS)
        if host is None:
            self._images.refuse("does not name the source's own namespaces")
        tasks = self._images.listed("pstree.img", "pstree")
        roots = [t for t in tasks if not t.number32(Task.PPID)]
        if len(roots) != 1:
            self._images.refuse(f"has {len(roots)} first processes, and not one")
        for task in tasks:
            pid = task.number32(Task.PID)
            for thread in (pid, *task.numbers32(Task.THREADS)):
                if thread != pid and pid:
                    self._leaders[f"core-{thread}.img"] = pid
                if f"core-{thread}.img" in names:
                    continue
                # CRIU writes any number as the thread of a process that has ended, and
                # does not read it.
                if thread == pid or not self._has_ended(f"core-{pid}.img"):
                    self._images.name = "pstree.img"
                    self._images.refuse(
                        f"has the process {thread}, but there is no core-{thread}.img"
                    )
            if f"ids-{pid}.img" in names:
                self._namespaces(self._images.only(f"ids-{pid}.img", "ids"), host)
            elif task is roots[0]:
                self._images.refuse("has a first process without namespaces of its own")
        for task in tasks:  # also if another process names it as one of its threads
            self._leaders.pop(f"core-{task.number32(Task.PID)}.img", None)
        self._check_parent(roots[0].number32(Task.PID))

    def _check_parent(self, pid: int | None) -> None:
        """The first process's parent is CRIU, which ends when the container runs."""
        thread = self._images.only(f"core-{pid}.img", "core").message(Core.THREAD)
        if thread is not None and thread.number32(Thread.PDEATH_SIG):
            self._images.refuse(
                "has a first process that gets a signal when its parent ends (prctl "
                "PR_SET_PDEATHSIG), so it would end at once: run it without that"
            )

    def _has_ended(self, name: str) -> bool:
        task = self._images.only(name, "core").message(Core.TC)
        return task is not None and task.number32(1) in criu.DEAD

    def _namespaces(self, ids: Message, host: Message) -> None:
        for kind, field in criu.NAMESPACES.items():
            same = (ids.number32(field) or 0) == (host.number32(field) or 0)
            if kind in self._kinds and same:
                self._images.refuse(f"has a process in the {kind} namespace of the host")
            if kind == "user" and kind not in self._kinds and not same:
                self._images.refuse("has a process in a user namespace, but config.json has none")

    def check_user_namespace(self, entry: Message) -> None:
        for field, key in ((1, "uidMappings"), (2, "gidMappings")):
            theirs = [tuple(m.number32(n) or 0 for n in (1, 2, 3)) for m in entry.messages(field)]
            ours = [
                (m.get("containerID", 0), m.get("hostID", 0), m.get("size", 0))
                for m in self._linux.get(key, [])
            ]
            if sorted(theirs) != sorted(ours):
                self._images.refuse(f"has other {key} than config.json")

    def check_core(self, core: Message) -> None:
        thread = core.message(Core.THREAD)
        creds = thread.message(Thread.CREDS) if thread is not None else None
        if thread is None or creds is None:
            task = core.message(Core.TC)
            if task is None or task.number32(1) not in criu.DEAD:
                self._images.refuse("has a process without credentials")
            return
        for name, field in _SETS.items():
            words = creds.numbers32(field)
            bits = sum(word << (32 * n) for n, word in enumerate(words[:2]))
            if any(words[2:]):  # the kernel has 64
                self._images.refuse(f"has a process with more capabilities ({name}) than there are")
            more = bits & ~(self._caps[name] if name == "bounding" else self._any_cap)
            if more:
                self._images.refuse(
                    f"has a process with {_names(more)} ({name}), but config.json does not give it"
                )
        if self._process.get("noNewPrivileges") and not creds.number32(Creds.NO_NEW_PRIVS):
            self._images.refuse(
                "has a process that may gain privileges, but config.json forbids it"
            )
        self._labels(creds)
        if self._linux.get("seccomp"):
            mode, task = thread.number32(Thread.SECCOMP_MODE), core.message(Core.TC)
            if task is not None and task.number32(criu.OLD_SECCOMP_MODE) is not None:
                self._images.refuse("has the seccomp mode of an old image, which CRIU would prefer")
            none = mode not in (1, 2) or (mode == 2 and _filter_of(thread) is None)
            if none and not (not mode and self._gets_filter(self._images.name)):
                self._images.refuse(
                    "has a process without a seccomp filter, but config.json has one"
                )
        ahead = thread.number32(Thread.POLICY) in _REALTIME
        if ahead and not self._any_cap & _bits(["CAP_SYS_NICE"]):
            self._images.refuse("has a process with real-time priority, but without CAP_SYS_NICE")

    def _gets_filter(self, name: str) -> bool:
        """Whether the image is of a thread that gets its process's filter.  CRIU writes no filter
        for a thread that has the same one, and marks that as one for all threads."""
        leader = self._leaders.get(name)
        if leader is None:
            return False
        if leader not in self._for_all:
            core = self._images.only(f"core-{leader}.img", "core")
            number = _filter_of(core.message(Core.THREAD) or Message(b""))
            flags = 0
            if number is not None:
                filters = self._images.only("seccomp.img", "seccomp").messages(Seccomp.FILTERS)
                flags = next((f.number32(Seccomp.FLAGS) or 0 for f in filters[number:]), 0)
            self._for_all[leader] = bool(flags & _TSYNC)
            self._images.name = name
        return self._for_all[leader]

    def _labels(self, creds: Message) -> None:
        profile = self._process.get("apparmorProfile") or self._process.get("selinuxLabel")
        theirs = creds.text(Creds.LSM_PROFILE)
        free = (None, "", "unconfined", *self._labels_allowed)
        if theirs not in free if profile is None else theirs != profile:
            self._images.refuse(
                f"has a process with the label {theirs!r}, but config.json has "
                f"{profile or 'none'}: to allow it, add it to apparmor or selinux in the "
                "container's policy on this host"
            )
        if creds.text(Creds.LSM_SOCKCREATE) not in (None, "", self._process.get("selinuxLabel")):
            self._images.refuse("has a process that gives its sockets a label")


def _filter_of(thread: Message) -> int | None:
    """The number of its filter in seccomp.img."""
    if thread.number32(Thread.SECCOMP_MODE) != 2:
        return None
    return thread.number32(Thread.SECCOMP_FILTER)


def _bits(names: Iterable[str]) -> int:
    known = {f"CAP_{name}": n for n, name in enumerate(criu.CAPABILITIES)}
    return sum(1 << known[name] for name in {*names} if name in known)


def _names(bits: int) -> str:
    known = dict(enumerate(criu.CAPABILITIES))
    found = [n for n in range(bits.bit_length()) if bits >> n & 1]
    return ", ".join(f"CAP_{known[n]}" if n in known else f"capability {n}" for n in found)
