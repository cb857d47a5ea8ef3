# SPDX-License-Identifier: Apache-2.0
"""A source is not root on the target: what of its config.json is taken over, and
whose memory images are restored."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ocispec import plain

from pyploop.errors import MigrateError
from pyploop.runtimes import config, policy
from pyploop.runtimes.config import ContainerConfig, DiskConfig
from pyploop.runtimes.oci import bundles, json_shapes
from pyploop.runtimes.policy import Source
from pyploop.runtimes.vzctl import conf_check

OURS = ContainerConfig(
    "web",
    bundle="/b",
    cgroup="/ours",
    netns="/run/netns/ours",
    disks=(DiskConfig("/srv/r.img", "/srv/r"),),
)
MOVED = {"/their/rootfs": "/srv/r"}
Change = Callable[[dict[str, Any]], object]


def fit(config: Any, **policies: Any) -> dict[str, Any]:
    ours = replace(OURS, policy=replace(policy.PLAIN, **policies))
    return bundles.adapt(config, {}, MOVED, ours)


def test_a_plain_container_is_written_anew_with_the_paths_of_this_host() -> None:
    theirs = plain()
    theirs["root"]["path"] = "/their/rootfs/sub"
    theirs["mounts"].append(
        {"destination": "/x", "source": "/their/rootfs/x", "options": ["bind", "ro"]}
    )
    theirs["linux"]["cgroupsPath"] = "/../../system.slice"
    theirs["linux"]["namespaces"][1]["path"] = "/run/netns/their"
    theirs["annotations"] = {"org.criu.config": "/their/rootfs/evil", "x": "y"}
    theirs["hooks"] = {"prestart": []}
    made = fit(theirs)
    assert made["root"] == {"path": "/srv/r/sub", "readonly": True}
    assert made["mounts"][-1] == {
        "destination": "/x",
        "source": "/srv/r/x",
        "type": "bind",
        "options": ["bind", "ro"],
    }
    assert made["linux"]["cgroupsPath"] == "/ours"
    assert made["linux"]["namespaces"][1] == {"type": "network", "path": "/run/netns/ours"}
    assert made["annotations"] == {"org.criu.config": "/b/criu.conf"}
    assert "hooks" not in made
    assert made["process"]["capabilities"]["inheritable"] == []
    assert fit(json.loads(json.dumps(made)) | {"root": theirs["root"]}) is not None


@pytest.mark.parametrize(
    "hook", ["/dev/shm/pyploop-0a/hook", '"/dev/shm/my images/pyploop-0a/hook"']
)
def test_the_hook_of_an_older_pyploop_is_forgotten(tmp_path: Path, hook: str) -> None:
    (tmp_path / bundles.CRIU).write_text(f"network-lock skip\naction-script {hook}\n")
    bundles.forget_hook(str(tmp_path))
    assert (tmp_path / bundles.CRIU).read_text() == "network-lock skip\n"


@pytest.mark.parametrize(
    ("resources", "limit"),
    [({"memory": {"limit": 5 << 20}}, 5 << 20), ({"memory": {"limit": -1}}, 0), ({}, 0), (None, 0)],
)
def test_the_memory_limit_is_that_of_config_json(resources: Any, limit: int) -> None:
    assert bundles.memory_limit({"linux": {"resources": resources}}) == limit
    assert bundles.memory_limit({}) == 0


def test_without_a_cgroup_here_the_one_of_the_source_is_not_taken() -> None:
    theirs = plain()
    theirs["linux"]["cgroupsPath"] = "/"
    made = bundles.adapt(theirs, {}, MOVED, replace(OURS, cgroup=""))
    assert "cgroupsPath" not in made["linux"]


def add(path: str, value: Any) -> Change:
    """Set or append at a place: 'linux.namespaces+' appends."""

    def change(config: dict[str, Any]) -> None:
        *above, last = path.rstrip("+").split(".")
        at: Any = config
        for part in above:
            at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
        if path.endswith("+"):
            at.setdefault(last, []).append(value)
        elif isinstance(at, list):
            at[int(last)] = value
        else:
            at[last] = value

    return change


def mount(destination: str, kind: str, source: str = "none", *options: str) -> Change:
    made = {"destination": destination, "type": kind, "source": source, "options": list(options)}
    return add("mounts+", made)


def without(path: str, value: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        at: Any = config
        for part in path.split("."):
            at = at[part]
        at[:] = [v for v in at if v != value and v.get("type") != value] if value else []

    return change


def no_path(key: str, path: str) -> Change:
    return lambda config: config["linux"][key].remove(path)


RULE = {"allow": True, "access": "rwm"}
HOOK = {"prestart": [{"path": "/bin/sh"}]}
ATTACKS: dict[str, tuple[Change, str]] = {
    "hooks": (add("hooks", HOOK), "hooks are commands"),
    "hooks that are no table": (add("hooks", [HOOK]), "hooks are commands"),
    # Go's JSON takes a key in any case, and folds two letters that are none of ASCII's.
    "Hooks": (add("Hooks", HOOK), "Hooks is not known"),
    "hooKs with a Kelvin sign": (add("hoo\u212as", HOOK), "is not known"),
    "hooks with a long s": (add("hook\u017f", HOOK), "is not known"),
    "Annotations": (add("Annotations", {"org.criu.config": "/x"}), "Annotations is not known"),
    "annotationS, empty": (add("annotationS", {}), "annotationS is not known"),
    "Linux": (add("Linux", {}), "Linux is not known"),
    "linux.Devices": (add("linux.Devices", []), "linux.Devices is not known"),
    "process.Capabilities": (add("process.Capabilities", {}), "process.Capabilities is not"),
    "mounts[0].Source": (add("mounts.0.Source", "/"), r"mounts\[0\].Source is not known"),
    "bind of /": (mount("/x", "bind", "/", "rbind"), r'external = \["/"\]'),
    "bind without type": (mount("/x", "", "/etc", "bind"), "external"),
    "bind by type alone": (mount("/x", "bind", "/etc"), "external"),
    "bind called tmpfs": (mount("/x", "tmpfs", "/etc", "bind"), "option 'bind'"),
    "bind beside the disk": (mount("/x", "bind", "/srv/r2", "bind"), "external"),
    "bind above the disk": (mount("/x", "bind", "/their/rootfs/../..", "bind"), "without . and"),
    "bind by a relative path": (mount("/x", "bind", "../../etc", "bind"), "without . and"),
    "bind on the kernel's": (mount("/proc/x", "bind", "/their/rootfs/x", "bind"), "kernel's"),
    "bind as /dev/null": (mount("/dev/null", "bind", "/their/rootfs/x", "bind"), "kernel's"),
    "shared": (mount("/x", "bind", "/their/rootfs/x", "bind", "rshared"), "'rshared'"),
    "idmap": (mount("/x", "bind", "/their/rootfs/x", "bind", "idmap"), "'idmap'"),
    "a disk of the host": (mount("/x", "ext4", "/dev/sda1"), "'ext4' on /x"),
    "overlay of the host": (mount("/x", "overlay", "o", "lowerdir=/"), "'lowerdir=/'"),
    "a path without end": (mount("/x" * 30_000, "tmpfs"), "more than the kernel takes"),
    "a second proc": (mount("/x", "proc", "proc"), "'proc' on /x"),
    "a second /proc": (mount("/proc", "proc", "proc"), "has a mount already"),
    "/proc/../proc": (mount("/proc/../proc", "proc"), "without . and"),
    "a relative destination": (mount("x", "tmpfs"), "absolute"),
    "a tmpfs on /sys": (mount("/sys/kernel", "tmpfs"), "where the kernel's files are"),
    "the root": (mount("/", "tmpfs"), "which is the root"),
    "devtmpfs": (mount("/dev2", "devtmpfs"), "'devtmpfs' on /dev2"),
    "/sys writable": (add("mounts.3.options", []), "has /sys writable"),
    "cgroups writable": (add("mounts.4.options", ["rw"]), "has /sys/fs/cgroup writable"),
    "the disk's /dev": (lambda c: c["mounts"].pop(1), "no tmpfs on /dev"),
    "/dev from the disk": (
        add("mounts.1", {"destination": "/dev", "source": "/their/rootfs/d", "options": ["bind"]}),
        "kernel's",
    ),
    "the disk's /dev, copied": (add("mounts.1.options+", "tmpcopyup"), "the disk's own /dev"),
    "mount ids": (add("mounts.0.uidMappings", []), "uidMappings is not known"),
    "root elsewhere": (add("root.path", "/"), "root.path is '/'"),
    "root beside": (add("root.path", "/their/rootfs2"), "root.path"),
    "root above": (add("root.path", "/their/rootfs/../x"), "without . and"),
    "a capability": (add("process.capabilities.bounding+", "CAP_SYS_ADMIN"), "CAP_SYS_ADMIN"),
    "ambient": (add("process.capabilities.ambient+", "CAP_SYS_PTRACE"), "CAP_SYS_PTRACE"),
    "a capability in small": (
        add("process.capabilities.bounding+", "cap_sys_admin"),
        "a capability's name",
    ),
    "no pid namespace": (without("linux.namespaces", "pid"), "no pid namespace"),
    "no mount namespace": (without("linux.namespaces", "mount"), "no mount namespace"),
    "no network namespace": (without("linux.namespaces", "network"), "no network namespace"),
    "no namespaces": (without("linux.namespaces", None), "no pid namespace"),
    "the host's ipc": (add("linux.namespaces.2.path", "/proc/1/ns/ipc"), "ipc namespace '/proc/1"),
    "twice a namespace": (add("linux.namespaces+", {"type": "pid"}), "'pid' twice"),
    "time": (add("linux.namespaces+", {"type": "time"}), "'time'"),
    "mappings alone": (
        add("linux.uidMappings", [{"containerID": 0, "hostID": 0, "size": 1}]),
        "only then",
    ),
    "a user namespace alone": (add("linux.namespaces+", {"type": "user"}), "uidMappings must"),
    "kernel memory": (add("linux.devices+", {"path": "/dev/mem", "type": "c"}), "/dev/mem"),
    "all devices": (add("linux.resources.devices+", RULE), "allows a -1:-1"),
    "all devices by an empty type": (
        add("linux.resources.devices+", {**RULE, "type": ""}),
        "allows a -1:-1",
    ),
    "a disk": (
        add("linux.resources.devices+", {**RULE, "type": "b", "major": 8, "minor": 0}),
        "allows b 8:0",
    ),
    "null as a block device": (
        add("linux.resources.devices+", {**RULE, "type": "b", "major": 1, "minor": 3}),
        "allows b 1:3",
    ),
    "nothing masked": (add("linux.maskedPaths", []), "does not have /proc/acpi"),
    "kcore not masked": (no_path("maskedPaths", "/proc/kcore"), '"/proc/kcore" to unprotected'),
    "/proc/sys writable": (no_path("readonlyPaths", "/proc/sys"), "/proc/sys"),
    "a sysctl of the host": (add("linux.sysctl", {"kernel.core_pattern": "1"}), "core_pattern"),
    "a sysctl by slashes": (
        add("linux.sysctl", {"net/../kernel/core_pattern": "1"}),
        "linux.sysctl has",
    ),
    "a command in a sysctl": (add("linux.sysctl", {"kernel.sem": "|/bin/sh"}), "'|/bin/sh'"),
    "shared root": (add("linux.rootfsPropagation", "shared"), "'shared'"),
    "intelRdt": (add("linux.intelRdt", {}), "intelRdt is not known"),
    "a network device": (add("linux.netDevices", {"eth0": {}}), "netDevices is not known"),
    "personality": (add("linux.personality", {"domain": "SVR4"}), "'SVR4'"),
    "a seccomp agent": (
        add("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x"}),
        "a socket",
    ),
    "seccomp that notifies": (add("linux.seccomp.defaultAction", "SCMP_ACT_NOTIFY"), "NOTIFY"),
    "an AppArmor profile": (add("process.apparmorProfile", "x"), "apparmor in"),
    "a SELinux label": (add("process.selinuxLabel", "system_u:x"), "selinux in"),
    "a mount label": (add("linux.mountLabel", "system_u:x"), "selinux in"),
    "oom score": (add("process.oomScoreAdj", -1000), "lower than the policy"),
    "real time": (
        add("process.rlimits+", {"type": "RLIMIT_RTPRIO", "hard": 99, "soft": 99}),
        "RLIMIT_RTPRIO",
    ),
    "cwd of runc's descriptors": (
        add("process.cwd", "/proc/self/fd/7"),
        "no container starts below",
    ),
    "cwd by /dev/fd": (add("process.cwd", "/dev/fd/7"), "no container starts"),
    "a NUL": (add("process.args", ["sh\0"]), "without a NUL"),
    "half a surrogate pair": (add("process.args", ["\ud800"]), "without a NUL"),
    "windows": (add("windows", {}), "windows is not known"),
    "vm": (add("vm", {}), "vm is not known"),
    "scheduler": (add("process.scheduler", {"policy": "SCHED_FIFO"}), "scheduler is not known"),
    "unified": (add("linux.resources.unified", {"../x": "1"}), "'../x'"),
    "blkio of a host's disk": (
        add("linux.resources.blockIO.throttleReadBpsDevice", []),
        "throttleReadBpsDevice is not known",
    ),
    "no OOM killer": (add("linux.resources.memory.disableOOMKiller", True), "run out of memory"),
    "a number as bool": (add("process.user.uid", True), "must be a number"),
    "a float": (add("process.user.uid", 0.0), "must be a number"),
    "a huge number": (add("process.user.uid", 1 << 80), "must be a number"),
    "infinity": (add("linux.resources.pids.limit", float("inf")), "must be a number"),
}


@pytest.mark.parametrize("name", list(ATTACKS))
def test_a_config_json_that_reaches_for_the_host_is_refused_and_the_place_named(name: str) -> None:
    change, named = ATTACKS[name]
    config = plain()
    fit(config)
    change(config)
    with pytest.raises(MigrateError, match=named) as e:
        fit(config)
    assert e.value.exit_code == 15
    assert str(e.value).startswith("config.json: ")


@pytest.mark.parametrize("bad", [None, [], {}, 7, "x", {"root": "x"}, {"root": {}, "process": {}}])
def test_what_is_no_configuration_is_refused(bad: Any) -> None:
    with pytest.raises(MigrateError) as e:
        fit(bad)
    assert e.value.exit_code == 15


def test_mount_points_that_the_source_made_up_lead_to_no_other_place_here() -> None:
    config = plain()
    config["root"]["path"] = "/etc/root"
    mount("/x", "bind", "/etc/shadow", "bind")(config)
    made = bundles.adapt(config, {}, {"/etc": "/srv/r"}, OURS)
    assert (made["root"]["path"], made["mounts"][-1]["source"]) == ("/srv/r/root", "/srv/r/shadow")
    for theirs in ("/", "//", "/et"):
        with pytest.raises(MigrateError, match="lies on no disk"):
            bundles.adapt(config, {}, {theirs: "/srv/r"}, OURS)


ALLOWED: dict[str, tuple[Change, dict[str, Any]]] = {
    "a capability": (
        add("process.capabilities.bounding+", "CAP_SYS_ADMIN"),
        {"capabilities": (*policy.CAPABILITIES, "CAP_SYS_ADMIN")},
    ),
    "kcore": (no_path("maskedPaths", "/proc/kcore"), {"unprotected": ("/proc/kcore",)}),
    "cgroups": (add("mounts.4.options", ["rw"]), {"unprotected": ("/sys/fs/cgroup",)}),
    "network": (
        without("linux.namespaces", "network"),
        {"namespaces": ("pid", "mount", "ipc", "uts")},
    ),
    "sysctl": (add("linux.sysctl", {"net.core.somaxconn": "1"}), {"sysctls": ("net.core.*",)}),
    "apparmor": (
        add("process.apparmorProfile", "docker-default"),
        {"apparmor": ("docker-default",)},
    ),
    "oom": (add("process.oomScoreAdj", -500), {"oom_score_adj": -500}),
    "rlimit": (
        add("process.rlimits", [{"type": "RLIMIT_RTPRIO", "hard": 1, "soft": 1}]),
        {"rlimits": ("RLIMIT_RTPRIO",)},
    ),
    "default device": (
        add("linux.resources.devices+", {**RULE, "type": "c", "major": 5, "minor": 1}),
        {},
    ),
    "mknod": (add("linux.resources.devices+", {"allow": True, "type": "c", "access": "m"}), {}),
}


@pytest.mark.parametrize("name", list(ALLOWED))
def test_what_the_policy_of_this_host_names_is_taken_over(name: str) -> None:
    change, policies = ALLOWED[name]
    config = plain()
    change(config)
    if policies:
        with pytest.raises(MigrateError):
            fit(config)
    fit(config, **policies)


def test_a_path_that_is_on_both_hosts_is_bound_when_this_host_says_so() -> None:
    config = plain()
    mount("/x", "bind", "/data", "rbind", "ro")(config)
    for external in ((), ("/dat",), ("/data/x",), ("/",)):
        with pytest.raises(MigrateError, match=r'external = \["/data"\]'):
            bundles.adapt(config, {}, MOVED, replace(OURS, external=external))
    made = bundles.adapt(config, {}, MOVED, replace(OURS, external=("/data/",)))
    assert made["mounts"][-1]["source"] == "/data"


def test_a_device_of_the_policy_has_the_numbers_that_it_has_here(tmp_path: Path) -> None:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no /dev/fuse here")
    st = os.stat("/dev/fuse")
    config = plain()
    config["linux"]["devices"] = [
        {
            "path": "/dev/fuse",
            "type": "c",
            "major": 8,
            "minor": 0,
            "fileMode": stat.S_IFBLK | 0o4666,
        }
    ]
    made = fit(config, devices=("/dev/fuse",))["linux"]
    numbers = {"major": os.major(st.st_rdev), "minor": os.minor(st.st_rdev)}
    assert made["devices"] == [{"path": "/dev/fuse", "type": "c", "fileMode": 0o666, **numbers}]
    assert made["resources"]["devices"] == [
        {"allow": False, "access": "rwm"},
        {"allow": False, "access": "rwm"},
        {"allow": True, "type": "c", "access": "rwm", **numbers},
    ]
    with pytest.raises(MigrateError, match="No such file"):
        fit(plain(), devices=("/dev/not-there",))


def test_user_ids_stay_within_the_range_of_the_policy() -> None:
    config = plain()
    config["linux"]["namespaces"].append({"type": "user"})
    for key in ("uidMappings", "gidMappings"):
        config["linux"][key] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    fit(config)
    fit(config, host_ids=("100000-165535",))
    for bad in ("100000-165534", "100001-165536", "0-5"):
        with pytest.raises(MigrateError, match="host_ids"):
            fit(config, host_ids=(bad,))
    with pytest.raises(MigrateError, match="no user namespace"):
        fit(plain(), host_ids=("100000-165535",))


@pytest.mark.parametrize(
    ("policies", "named"),
    [
        ({"no_new_privileges": "required"}, "noNewPrivileges must be true"),
        ({"seccomp": "required"}, "linux.seccomp must refuse"),
        ({"namespaces": (*policy.NAMESPACES, "cgroup")}, "no cgroup namespace"),
    ],
)
def test_a_policy_may_ask_for_more_than_the_default(policies: dict[str, Any], named: str) -> None:
    config = plain()
    config["process"]["noNewPrivileges"] = False
    config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
    with pytest.raises(MigrateError, match=named):
        fit(config, **policies)


@pytest.mark.invariant(number=5)
def test_what_is_written_is_made_of_known_keys_whatever_came() -> None:
    """Nothing of the source's text reaches runc but what passed each check."""
    known: set[str] = set()

    def keys(value: Any) -> None:
        if isinstance(value, dict):
            known.update(value)
            for v in value.values():
                keys(v)
        elif isinstance(value, list):
            for v in value:
                keys(v)

    keys(fit(plain()))
    paths: list[list[Any]] = []

    def places(value: Any, at: list[Any]) -> None:
        paths.append(at)
        for k, v in value.items() if isinstance(value, dict) else ():
            places(v, [*at, k])
        for n, v in enumerate(value) if isinstance(value, list) else ():
            places(v, [*at, n])

    places(plain(), [])
    odd: st.SearchStrategy[Any] = st.sampled_from(
        [
            *(None, True, 0, -1, 1 << 70, 1.5, float("nan"), "", "/", "../x", "\ud800", [], [[]]),
            *({}, {"x": 1}, [None], ["a" * 5000], {"path": "/"}, {"Path": "/"}),
        ]
    )

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(paths[1:]), odd, st.booleans()), max_size=3))
    def damaged(edits: list[tuple[list[Any], Any, bool]]) -> None:
        config: Any = plain()
        for path, value, into in edits:
            at = config
            for part in path[:-1]:
                try:
                    at = at[part]
                except (TypeError, LookupError):
                    break
            else:
                if into and isinstance(at, dict):
                    at[f"{path[-1]}".upper()] = value
                else:  # an edit before this one may have left something else there
                    with contextlib.suppress(TypeError, IndexError):
                        at[path[-1]] = copy.deepcopy(value)
        try:
            made = fit(config)
        except MigrateError as e:
            assert e.exit_code == 15
            return
        found = set(known)
        known.clear()
        keys(made)
        assert known <= found
        known.update(found)

    damaged()


# ---- as text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"hooks": {}, "hooks": {"prestart": []}}', "'hooks' comes twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' comes twice"),
        ('{"a": NaN}', "NaN is not a number"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ('{"a": 1' + "0" * 5000 + "}", "too large"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1} {"hooks": 1}', "Extra data"),
        ("", "Expecting value"),
        ('{"a": "\xff"}', "utf-8"),
        ('{"a": 1}', "utf-8"),
    ],
)
def test_json_that_readers_disagree_about_is_refused(tmp_path: Path, text: str, named: str) -> None:
    data = text.encode("utf-16" if named == "utf-8" and "\xff" not in text else "latin-1")
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(MigrateError, match=named) as e:
        bundles.read(str(tmp_path))
    assert e.value.exit_code == 15


def test_of_many_keys_the_one_that_comes_twice_is_soon_found(tmp_path: Path) -> None:
    keys = [f"{n:05}" for n in (*range(13_000), 12_999)]
    text = ",".join(f'"{key}":0' for key in keys)
    (tmp_path / "config.json").write_text(f"{{{text}}}")
    before = time.process_time()
    with pytest.raises(MigrateError, match="'12999' comes twice"):
        bundles.read(str(tmp_path))
    assert time.process_time() - before < 2  # of ten


def test_a_sparse_config_json_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(MigrateError, match="not a container's configuration"):
        bundles.read(str(tmp_path))


def test_numbers_up_to_64_bits_are_read() -> None:
    largest = (1 << 64) - 1
    assert json_shapes.loads(b'{"a": [%d, -1, 1e3, true, null]}' % largest) == {
        "a": [largest, -1, 1000.0, True, None]
    }


# ---- sources


@pytest.mark.parametrize(
    ("live", "source", "trusted"),
    [
        ((), Source(), False),
        ((), Source(name="a"), False),
        (("a",), Source(name="a"), True),
        (("a",), Source(name="A"), False),
        (("a",), Source(address="a"), False),
        (("10.0.0.1",), Source(address="10.0.0.1"), True),
        (("10.0.0.0/24",), Source(address="10.0.0.200"), True),
        (("10.0.0.0/24",), Source(address="10.0.1.1"), False),
        (("10.0.0.0/24",), Source(address="::ffff:10.0.0.1"), True),
        (("2001:db8::/32",), Source(address="2001:db8::7"), True),
        # --source goes before an address: the key decides.
        (("10.0.0.1",), Source(name="evil", address="10.0.0.1"), False),
        (("0.0.0.0/0",), Source(address="not an address"), False),
        (("",), Source(), False),
    ],
)
def test_who_is_trusted_is_what_this_host_knows_of_the_source(
    live: tuple[str, ...], source: Source, trusted: bool
) -> None:
    assert policy.trusts(live, source) is trusted


def test_the_source_is_named_by_the_command_line_or_by_sshd_and_by_nothing_else() -> None:
    environment = {"SSH_CONNECTION": "10.0.0.1 4711 10.0.0.2 22", "SSH_ORIGINAL_COMMAND": "x"}
    assert policy.source_of("a", environment) == Source(name="a")
    assert policy.source_of(None, environment) == Source(address="10.0.0.1")
    assert policy.source_of("", {}) == Source()


def test_a_container_may_have_a_policy_of_its_own() -> None:
    table = {
        "policy": {"capabilities": ["CAP_KILL"], "seccomp": "required"},
        "trust": {"live": ["a", "10.0.0.0/8"]},
        "container": {
            "web": {"tree": {"path": "/t"}, "policy": {"capabilities": []}},
            "db": {"tree": {"path": "/u"}},
        },
    }
    host = config.parse(table, "x.toml")
    assert host.trusted_live == ("a", "10.0.0.0/8")
    assert host.policy_of("web") == replace(policy.PLAIN, capabilities=(), seccomp="required")
    assert host.policy_of("db").capabilities == host.policy_of("101").capabilities == ("CAP_KILL",)


@pytest.mark.parametrize(
    "name", ["\u0661\u0660\u0661", "0101", "101\n", "", "²", "1" * 11, "-1", "0"]
)
def test_only_digits_of_ascii_are_a_ctid(name: str) -> None:
    assert config.CTID.fullmatch(name) is None
    assert config.CTID.fullmatch("101")


# ---- CTID.conf


@pytest.mark.parametrize(
    "line",
    [
        "X=$(touch /tmp/x)",
        'NAME="`id`"',
        "NAME=a;reboot",
        "reboot",
        'NAME="a" reboot',
        "export NAME=a",
        ". /etc/passwd",
        'NAME="a\nreboot"',
        'DEVNODES="sda:rw"',
        'CAPABILITY="SYS_ADMIN:on"',
        'DUMPDIR="/etc"',
        'NETDEV="eth0"',
        'OSTEMPLATE="../../../tmp/x"',
        'NAME="${X:-$(id)}"',
        'VE_PRIVATE="$X"',
        'NAME="\\"',
        "NAME=a\rreboot",
        'VEID="../../etc"',
        "VEID=102",
        "VEID=",
        'NAME="../../cron.d/x"',
        'UUID="../x"',
        'TEMPLATES="../x"',
        'NETIF="ifname=eth0,bridge=../x"',
        "ONBOOT=no",
        'IP_ADDRESS="10.0.0.2"',
        'IP_ADDRESS="10.0.0.1 10.0.0.2/24"',
        "IP_ADDRESS=$VEID",
    ],
)
def test_a_ctid_conf_names_no_command_and_nothing_of_the_host(tmp_path: Path, line: str) -> None:
    path = tmp_path / "101.conf"
    path.write_bytes(f'# comment\n\nONBOOT="yes"\n{line}\n'.encode())
    with pytest.raises(MigrateError, match=r"101\.conf, line 4") as e:
        conf_check.check(path, "101", policy.PLAIN, ["10.0.0.1"])
    assert e.value.exit_code == 15


@pytest.mark.parametrize(
    "line", [" " * 100_000 + "!", "\t" * 100_000, 'NAME="' + "a" * 100_000, "A" * 100_000]
)
def test_a_long_line_of_a_ctid_conf_is_soon_read(tmp_path: Path, line: str) -> None:
    """Spaces alone kept the agent busy for a quarter of an hour."""
    path = tmp_path / "101.conf"
    path.write_text(line)
    before = time.process_time()
    with contextlib.suppress(MigrateError):
        conf_check.check(path, "101", policy.PLAIN, [])
    assert time.process_time() - before < 20  # of hundreds


def test_a_ctid_conf_of_plain_values_is_taken_and_more_where_the_policy_says_so(
    tmp_path: Path,
) -> None:
    path = tmp_path / "101.conf"
    path.write_text(
        'VEID="101"\nONBOOT="yes"\nPHYSPAGES="0:65536"\nVE_ROOT="/vz/root/$VEID"\n'
        "VE_PRIVATE=/vz/private/$VEID # x\n"
        "NETIF=ifname=eth0,bridge=br0,ip=10.0.0.9/255.255.255.0,host_ifname=veth101.0\n"
        "IP_ADDRESS='10.0.0.1'\nOSTEMPLATE=\".debian-12-x86_64\"\nNAME=\n"
    )
    conf_check.check(path, "101", policy.PLAIN, ["10.0.0.1"])
    with path.open("a") as f:
        f.write('DEVNODES="fuse:rw"\n')
    with pytest.raises(MigrateError, match="vz_parameters"):
        conf_check.check(path, "101", policy.PLAIN, ["10.0.0.1"])
    allowing = replace(policy.PLAIN, vz_parameters=("DEVNODES",))
    conf_check.check(path, "101", allowing, ["10.0.0.1"])
