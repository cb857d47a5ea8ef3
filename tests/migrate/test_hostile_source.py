# SPDX-License-Identifier: Apache-2.0
"""A source that wants to be root on the target.  Each test is an attack that worked
once, or one of its kind: it is refused, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anysource
import pytest
import support
from anysource import Hostile
from lab import container, requirements
from lab.hosts import Lab
from moving import debris, files, migrate, only_side
from ocispec import plain
from support import MIB
from vzlab import CTID, DESCRIPTOR, VzHost, make_host

from pyploop.errors import MigrateError
from pyploop.runtimes import Disk, config, volumes
from pyploop.runtimes.config import DiskConfig
from pyploop.runtimes.oci import bundles
from pyploop.runtimes.runc.container import size_of
from pyploop.runtimes.runc.runtime import Runc
from pyploop.runtimes.runc.target import version_of
from pyploop.runtimes.vzctl.runtime import Vzctl

CONF = b'NAME="web"\nONBOOT="no"\n'
XML = ("private:root.hdd/DiskDescriptor.xml", 0o644, DESCRIPTOR.encode())
FACTS: dict[str, Any] = {"simfs": False, "ips": [], "top": "root.hdd/root.hds", "links": {}}


STATUS = f'#!/bin/sh\necho "CTID {CTID} deleted unmounted down"\n'


@pytest.fixture
def target(tmp_path: Path) -> VzHost:
    """Its containers are never there."""
    support.needs("root")
    host = make_host(tmp_path / "b", tmp_path / "a")
    (host.folder / "bin/vzctl").write_text(STATUS)
    (host.folder / "bin/vzlist").write_text("#!/bin/sh\n")
    return host


@pytest.fixture
def source(target: VzHost) -> Iterator[Hostile]:
    with anysource.source(target.folder / "migrate.toml") as made:
        yield made


def started(source: Hostile, **facts: Any) -> Hostile:
    source.check(CTID, "vzctl", {**FACTS, **facts}, sizes=[] if facts.get("simfs") else [0])
    source.begin()
    return source


def snapshot(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def refused(source: Hostile, act: Callable[[], object], named: str) -> MigrateError:
    with pytest.raises(MigrateError, match=named) as e:
        act()
    source.close()
    return e.value


# ---- files


@pytest.mark.parametrize(
    "links",
    [
        {"../evil": "x"},
        {"a/../../evil": "x"},
        {"/etc/evil": "x"},
        {"x": "../.."},
        {"x": ".."},
        {"x": "."},
        {"x": ""},
        {"root.hdd": ".ve"},
        {"root.hdd/root.hds": "x"},
        {"x/": "y"},
        {"./x": "y"},
        {"x\0": "y"},
        {"x": ["y"]},
        {"x": None},
        {"": "y"},
        ["x"],
        7,
    ],
)
def test_a_link_of_the_private_area_leads_and_lies_nowhere_else(
    target: VzHost, source: Hostile, links: Any
) -> None:
    before = snapshot(target.folder)
    refused(source, lambda: started(source, links=links), "link|lies outside|where the disk goes")
    assert snapshot(target.folder) - before <= {"lock", "lock/migration.0", "lock/migration.1"}


@pytest.mark.parametrize(
    "label",
    [
        "private:../evil",
        "private:x/../../evil",
        "private:/etc/evil",
        "private:x//y",
        "private:./x",
        "private:x/",
        "private:",
        "private:root.hdd/root.hds",
        "script:../../evil",
        "script:boot",
        "conf:x",
        "config.json",
        "",
    ],
)
@pytest.mark.invariant(number=5)
def test_an_item_comes_to_no_other_place(target: VzHost, source: Hostile, label: str) -> None:
    before = snapshot(target.folder)
    started(source)
    files = [("conf", 0o644, CONF), XML, (label or "x", 0o644, b"evil")]
    refused(
        source, lambda: source.send_items(files), "outside the private|which no such container has"
    )
    left = snapshot(target.folder) - before
    assert not [p for p in left if not p.startswith(("lock", "varlib"))], left
    assert not list(target.folder.rglob("*evil*"))


def test_items_come_once(target: VzHost, source: Hostile) -> None:
    """The second ones went through the links that the first ones had made."""
    started(source, links={"x": "y"})
    source.send_items([("conf", 0o644, CONF), XML])
    private = target.folder / f"private/{CTID}"
    assert os.readlink(private / "x") == "y"
    refused(
        source,
        lambda: source.send_items([("private:x/evil", 0o644, b"evil")]),
        "the request `items` came twice",
    )
    assert not private.exists()
    assert not (target.folder / f"etc/vz/conf/{CTID}.conf").exists()


def test_a_container_in_a_directory_has_no_files_beside_it(
    target: VzHost, source: Hostile, tmp_path: Path
) -> None:
    """A link in the tree, which comes by rsync, and an item behind it wrote anywhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    source.check(CTID, "vzctl", {**FACTS, "simfs": True, "trees": [0]})
    source.begin()
    private = target.folder / f"private/{CTID}"
    private.mkdir()
    (private / "x").symlink_to(outside)
    try:
        refused(
            source,
            lambda: source.send_items([("private:x/evil", 0o4755, b"evil")]),
            "which no such container has",
        )
        assert list(outside.iterdir()) == []
    finally:
        (private / "x").unlink(missing_ok=True)


def test_a_link_that_appears_in_the_private_area_is_followed_neither_way(
    target: VzHost, source: Hostile, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    started(source)
    private = target.folder / f"private/{CTID}"
    private.mkdir()
    (private / "root.hdd").symlink_to(outside)
    (outside / "DiskDescriptor.xml").write_text("root's")
    with pytest.raises(MigrateError):
        source.send_items([("conf", 0o644, CONF), XML])
    source.close()
    assert [p.name for p in outside.iterdir()] == ["DiskDescriptor.xml"]
    assert (outside / "DiskDescriptor.xml").read_text() == "root's"


def test_no_file_that_comes_is_a_program(target: VzHost, source: Hostile) -> None:
    started(source)
    delta = ("private:root.hdd/base.hds", 0o6755, b"#!/bin/sh\n")
    source.send_items([("conf", 0o4755, CONF), XML, delta, ("script:mount", 0o4755, b"#!x")])
    conf = target.folder / "etc/vz/conf"
    private = target.folder / f"private/{CTID}"
    found = [conf / f"{CTID}.conf", *(p for p in private.rglob("*") if p.is_file())]
    assert len(found) == 3
    for path in [*found, *conf.glob(f"{CTID}.mount*")]:
        assert path.stat().st_mode & 0o7111 == 0, path
    # vzctl runs CTID.mount by that name.
    assert not (conf / f"{CTID}.mount").exists()
    for folder in (private, private / "root.hdd"):
        assert folder.stat().st_mode & 0o777 == 0o700
    source.close()
    assert not private.exists()
    assert list(conf.glob(f"{CTID}.*")) == []


def test_an_action_script_comes_only_where_the_policy_says_so(target: VzHost) -> None:
    config = target.folder / "migrate.toml"
    config.write_text(config.read_text().replace("action_scripts = true", ""))
    with anysource.source(config) as honest:
        found = refused(honest, lambda: started(honest, scripts=["mount"]), "action_scripts = true")
        assert found.exit_code == 15
    for label in ("script:mount", "private:scripts/start", "private:scripts"):
        with anysource.source(config) as liar:
            started(liar)
            with pytest.raises(MigrateError, match="action_scripts = true"):
                liar.send_items([(label, 0o755, b"#!/bin/sh\n")])
        assert not list((target.folder / "etc/vz/conf").glob(f"{CTID}.*"))
        assert not (target.folder / f"private/{CTID}").exists()
    # By a link that has this name, or as the disk.
    for facts in (
        {"links": {"scripts": "x"}},
        {"links": {"scripts/mount": "x"}},
        {"top": "scripts/x"},
    ):
        with anysource.source(config) as liar:
            refused(liar, lambda: started(liar, **facts), "action_scripts = true")  # noqa: B023


@pytest.mark.parametrize("name", ["DiskDescriptor.xml", "", "a link"])
def test_a_directory_that_vzctl_would_take_for_a_ploop_disk_is_not_started(
    target: VzHost, source: Hostile, name: str
) -> None:
    """Its descriptor came with the tree, was read by nobody here, and may name any file."""
    private = target.folder / f"private/{CTID}"
    (target.folder / "netns").touch()
    vz = Vzctl(config.load(str(target.folder / "migrate.toml")), CTID)
    vz.check_target({**FACTS, "simfs": True}, live=False)
    vz.release()
    private.mkdir()
    if name == "a link":
        (private / "root.hdd").symlink_to("/nowhere")
    else:
        (private / "root.hdd" / name).mkdir(parents=True)
    with pytest.raises(MigrateError, match=r"has sent .*root\.hdd") as e:
        vz.release()
    assert e.value.exit_code == 15


def test_an_address_that_was_not_told_is_nobody_elses(target: VzHost, source: Hostile) -> None:
    """It was compared with those in use here as the source told it only."""
    (target.folder / "bin/vzlist").write_text("#!/bin/sh\necho - 10.0.0.5 2001:db8::a\n")
    conf = CONF + b'IP_ADDRESS="10.0.0.5"\n'
    for ip in ("10.0.0.5", "10.0.0.5/24", "2001:DB8:0::A/64", "2001:0db8::0.0.0.10"):
        with anysource.source(target.folder / "migrate.toml") as honest:
            found = refused(honest, lambda: started(honest, ips=[ip]), "has the address")  # noqa: B023
            assert found.exit_code == 12
    started(source, ips=["10.0.0.6"])
    act = lambda: source.send_items([("conf", 0o644, conf), XML])  # noqa: E731
    assert refused(source, act, "10.0.0.5, which the source did not announce").exit_code == 15
    assert not list((target.folder / "etc/vz/conf").glob(f"{CTID}.*"))


@pytest.mark.parametrize(
    "conf", [b'DEVNODES="sda:rw"\n', b'NAME="$(touch /x)"\n', b"reboot\n", b'DUMPDIR="/etc"\n']
)
def test_a_configuration_that_reaches_for_the_host_is_seen_by_no_vzctl(
    target: VzHost, source: Hostile, conf: bytes
) -> None:
    started(source)
    act = lambda: source.send_items([("conf", 0o644, CONF + conf), XML])  # noqa: E731
    assert refused(source, act, rf"{CTID}\.conf, line 3").exit_code == 15
    assert not list((target.folder / "etc/vz/conf").glob(f"{CTID}.*"))


@pytest.mark.parametrize("name", ["/etc/shadow", "../../../etc/shadow", "base.hds", "sub/x"])
def test_a_descriptor_names_only_files_of_the_container(
    target: VzHost, source: Hostile, name: str
) -> None:
    started(source)
    xml = DESCRIPTOR.replace("root.hds", name).encode()
    act = lambda: source.send_items([("conf", 0o644, CONF), (XML[0], 0o644, xml)])  # noqa: E731
    refused(source, act, "lies outside|is not the disk that|No such file")
    assert not (target.folder / f"private/{CTID}").exists()


@pytest.mark.parametrize("how", ["link", "link above", "two dots", "fifo"])
def test_what_a_container_calls_its_disk_is_no_file_of_the_host(
    target: VzHost, tmp_path: Path, how: str
) -> None:
    """The root of a container in a directory is its private area, and may hold what vzctl
    takes for a ploop disk."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "root.hds").write_bytes(b"root's")
    hdd = target.folder / f"private/{CTID}/root.hdd"
    hdd.mkdir(parents=True)
    (target.folder / f"etc/vz/conf/{CTID}.conf").write_bytes(CONF)
    name = {"link above": "x/root.hds", "two dots": "../../../../secret/root.hds"}.get(how)
    (hdd / "DiskDescriptor.xml").write_text(DESCRIPTOR.replace("root.hds", name or "root.hds"))
    if how == "fifo":
        os.mkfifo(hdd / "root.hds")
    else:
        (hdd / "root.hds").symlink_to(secret / "root.hds")
        (hdd / "x").symlink_to(secret)
    vz = Vzctl(config.load(str(target.folder / "migrate.toml")), CTID)
    for act in (lambda: vz.disks(source=True), lambda: vz.check_source(live=False)):
        with pytest.raises(MigrateError, match=r"not a regular file|lies outside") as e:
            act()
        assert e.value.exit_code == 6


# ---- config.json


@pytest.fixture
def bundle(target: VzHost) -> Path:
    """Of the container `web` of the target, which is a tree."""
    support.needs("rsync")
    bundle = target.folder / "bundle"
    config = target.folder / "migrate.toml"
    (target.folder / "netns").touch()
    config.write_text(
        f'{config.read_text()}\n[runc]\nroot = "{target.folder}/runc"\n[container.web]\n'
        f'bundle = "{bundle}"\nnetns = "{target.folder}/netns"\n'
        f'[[container.web.tree]]\npath = "{bundle}/rootfs"\n'
    )
    return bundle


def begun(source: Hostile, config: dict[str, Any]) -> Hostile:
    facts = {"mounts": ["/their/rootfs"], "config": config, "trees": [0]}
    source.check("web", "runc", facts)
    source.begin()
    return source


def test_the_memory_limit_that_comes_counts_when_a_lazy_restore_is_chosen(
    target: VzHost, bundle: Path
) -> None:
    theirs = plain()
    theirs["linux"]["resources"] = {"memory": {"limit": 208 * MIB}}
    runc = Runc(config.load(str(target.folder / "migrate.toml")), "web")
    runc.check_target({"mounts": ["/their/rootfs"], "config": theirs, "trees": [0]}, live=False)
    told = {"private": 218 * MIB, "forked": 15 * MIB, "whole": 0}
    for why in (runc.lazy.choose("auto", told).why, runc.lazy.why_no_post_copy("auto", told)):
        assert "the container's memory limit of 208.0 MiB" in why


def test_the_config_json_that_comes_is_never_the_one_that_runc_reads(
    target: VzHost, bundle: Path
) -> None:
    before = snapshot(target.folder)
    config = plain()
    with anysource.source(target.folder / "migrate.toml") as made:
        begun(made, config)
        made.send_items([("config.json", 0o4755, json.dumps(config, indent=7).encode())])
        assert sorted(p.name for p in bundle.iterdir()) == ["config.json", "criu.conf"]
        written = json.loads((bundle / "config.json").read_bytes())
        assert written["root"]["path"] == f"{bundle}/rootfs"
        assert written["annotations"] == {"org.criu.config": f"{bundle}/criu.conf"}
        assert bundle.stat().st_mode & 0o777 == 0o700
    assert not bundle.exists()
    for text, named in (
        (json.dumps({**config, "hostname": "other"}), "has changed since it was checked"),
        (json.dumps({**config, "Hooks": {}}), "Hooks is not known"),
        (json.dumps(config)[:-1] + ', "root": {"path": "/"}}', "'root' comes twice"),
        (json.dumps(config).replace("1024", "NaN", 1), "NaN is not a number"),
        ("[" * 100_000, "nested too deeply"),
    ):
        with anysource.source(target.folder / "migrate.toml") as made:
            begun(made, config)
            with pytest.raises(MigrateError, match=named) as e:
                made.send_items([("config.json", 0o644, text.encode())])
            assert e.value.exit_code == 15
            assert not (bundle / "config.json").exists()
        assert not bundle.exists()
    left = snapshot(target.folder) - before
    assert not [p for p in left if not p.startswith(("lock", "varlib"))], left


@pytest.mark.parametrize("link", ["root", "above the root", "bound", "above what is bound"])
def test_a_link_on_what_came_does_not_lead_runc_to_the_host(
    target: VzHost, bundle: Path, link: str
) -> None:
    """`/srv/web/rootfs/x`, bound from the tree, may be a link there."""
    host = config.load(str(target.folder / "migrate.toml"))
    web = Runc(host, "web")
    tree = bundle / "rootfs"
    (tree / "sub/root").mkdir(parents=True)
    (tree / "data/x").mkdir(parents=True)
    given = plain()
    given["root"]["path"] = "/their/rootfs/sub/root"
    bind = {"destination": "/x", "source": "/their/rootfs/data/x", "options": ["bind"]}
    given["mounts"].append(bind)
    web._written = bundles.adapt(given, {}, {"/their/rootfs": str(tree)}, host.container("web"))
    web.release()
    path = (
        tree
        / {
            "root": "sub/root",
            "above the root": "sub",
            "bound": "data/x",
            "above what is bound": "data",
        }[link]
    )
    shutil.rmtree(path)
    path.symlink_to("/")
    with pytest.raises(MigrateError, match=r"of config\.json(: Too many| is a symbolic link)") as e:
        web.release()
    assert e.value.exit_code == 15


# ---- memory


def test_memory_of_a_source_that_is_not_trusted_is_not_taken(target: VzHost) -> None:
    config = target.folder / "migrate.toml"
    with anysource.source(config, "x") as other:
        with pytest.raises(MigrateError, match="run on this host: pyploop trust --key x") as e:
            other.check(CTID, "vzctl", FACTS, sizes=[0], live=True)
        assert e.value.exit_code == 15
    with anysource.source(config, "x") as other:
        other.check(CTID, "vzctl", FACTS, sizes=[0])
    with anysource.source(config, "a") as trusted:
        trusted.check(CTID, "vzctl", FACTS, sizes=[0], live=True)


def test_memory_is_not_taken_after_a_check_for_a_container_that_has_stopped(
    source: Hostile,
) -> None:
    started(source)
    for op, args in (("dump", {"channel": 9}), ("restore", {"timeout": 1.0})):
        with pytest.raises(MigrateError, match="only in a live migration"):
            source.ask(op, **args)


def test_nothing_begins_after_a_check_that_failed(target: VzHost, source: Hostile) -> None:
    with pytest.raises(MigrateError, match="lies outside"):
        source.check(CTID, "vzctl", {**FACTS, "top": "../x"}, sizes=[0])
    with pytest.raises(MigrateError, match="`begin` must come once"):
        source.begin()
    assert not list(target.folder.glob("varlib/**/*.json"))
    started(source)  # by all the checks of another one


def test_a_second_check_after_the_first_changes_nothing(source: Hostile) -> None:
    started(source)
    with pytest.raises(MigrateError, match="`check` came twice"):
        source.check(CTID, "vzctl", FACTS, sizes=[0], live=True)


NOT_JSON: list[Any] = [float("nan"), float("inf"), -float("inf"), 1 << 4000, "\ud800"]
"""With these in a message the connection ends (test_agent_limits.py)."""
ODD: list[Any] = [
    *(-1, 1.5, 1 << 63, "x", "\0", None, True, [], [[]], {}, {"a": 1.5}, ["\0"], [None], [{}]),
]
KEYS = {
    "vzctl": ("machine", "cpu", "trees", "top", "links", "ips", "simfs", "scripts", "source"),
    "runc": ("mounts", "config", "paths", "external", "kinds", "memory", "criu"),
}


@pytest.mark.parametrize(("runtime", "key"), [(r, k) for r, keys in KEYS.items() for k in keys])
def test_a_fact_of_an_odd_type_is_refused_or_of_no_account(
    target: VzHost, key: str, runtime: str
) -> None:
    config = target.folder / "migrate.toml"
    bundle = target.folder / "bundle"
    section = f'[container.{CTID}]\nbundle = "{bundle}"\n[[container.{CTID}.tree]]\n'
    config.write_text(f'{config.read_text()}\n{section}path = "{bundle}/rootfs"\n')
    for value in ODD:
        with anysource.source(config) as made:
            try:
                made.check(CTID, runtime, {**FACTS, key: value}, sizes=[0])
            except MigrateError as e:
                assert e.exit_code in range(1, 21), value
            assert made.ask("clock")["monotonic"] > 0, value


@pytest.mark.parametrize("value", ODD)
def test_an_argument_of_an_odd_type_is_refused(target: VzHost, value: Any) -> None:
    ops: dict[str, tuple[str, ...]] = {
        "check": ("container", "runtime", "live", "facts", "sizes", "nodeps"),
        "begin": ("migration", "stall", "keep"),
        "disk": ("index", "channel", "reuse"),
        "tree": ("index", "channel", "last"),
        "dump": ("channel", "number", "parent", "room"),
        "join": ("name", "timeout"),
        "digests": ("channel", "files"),
        "settle": ("migration",),
        "forget": ("migration",),
    }
    with anysource.source(target.folder / "migrate.toml") as made:
        started(made)
        for op, names in ops.items():
            with pytest.raises(MigrateError):
                made.ask(op, **dict.fromkeys(names, value))
        assert made.ask("clock")["monotonic"] > 0


@pytest.mark.parametrize("value", NOT_JSON + ODD)
def test_an_odd_size_of_the_memory_or_version_of_criu_is_none(value: Any) -> None:
    try:
        assert 0 <= size_of(value) <= 1 << 60
    except MigrateError as e:
        assert e.exit_code == 15
    assert version_of(value) in ((), *((v,) for v in range(10)))


# ---- mounts


def disk_with(folder: Path, name: str, fill: Callable[[Path], object]) -> Path:
    contents = folder / f"{name}-contents"
    contents.mkdir()
    fill(contents)
    image = folder / f"{name}.img"
    with image.open("wb") as f:
        f.truncate(8 << 20)
    support.run("mkfs.ext4", "-q", "-F", "-d", contents, image)
    return image


def flags_of(point: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    (line,) = [x for x in lines if x.split()[4] == str(point)]
    return [*line.split()[5].split(","), *line.split(" - ")[1].split()[2].split(",")]


def setuid(root: Path) -> None:
    (root / "su").write_bytes(b"x")
    (root / "su").chmod(0o4755)


def test_a_disk_is_held_without_effect_and_released_as_it_is_configured(tmp_path: Path) -> None:
    support.needs("root", "loop", "mkfs.ext4")
    image, point = disk_with(tmp_path, "one", setuid), tmp_path / "m"
    point.mkdir()
    disk = Disk(str(image), str(point), "ext4", "rw,noatime")
    volumes.mount(disk, restricted=True)
    try:
        assert {"nosuid", "nodev", "noatime", "errors=remount-ro"} <= {*flags_of(point)}
        assert (point / "su").stat().st_mode & stat.S_ISUID
        volumes.release(disk)
        assert not {"nosuid", "nodev"} & {*flags_of(point)}
        assert {"rw", "noatime"} <= {*flags_of(point)}
        volumes.release(Disk(str(image), str(point), "ext4", "ro,nosuid"))
        assert {"ro", "nosuid"} <= {*flags_of(point)[:6]}
    finally:
        volumes.unmount({"mount": str(point), "image": str(image)})
    assert DiskConfig("/i", "/m").options == "rw"


def test_a_disk_that_asks_the_kernel_to_panic_on_errors_does_not_get_it(tmp_path: Path) -> None:
    support.needs("root", "loop", "mkfs.ext4")
    image, point = disk_with(tmp_path, "one", setuid), tmp_path / "m"
    support.run("tune2fs", "-e", "panic", image)
    point.mkdir()
    for options, wanted in (("rw", "errors=remount-ro"), ("rw,errors=continue", "rw")):
        volumes.mount(Disk(str(image), str(point), "ext4", options))
        try:
            assert wanted in flags_of(point)
            assert "errors=panic" not in flags_of(point)
        finally:
            volumes.unmount({"mount": str(point), "image": str(image)})


@pytest.mark.parametrize("how", ["link to the host", "folder"])
def test_a_disk_is_not_mounted_within_another_one_that_came(tmp_path: Path, how: str) -> None:
    support.needs("root", "loop", "mkfs.ext4")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "passwd").write_text("root's")

    def fill(root: Path) -> None:
        if how == "folder":
            (root / "data").mkdir()
        else:
            (root / "data").symlink_to(victim)

    one, two = disk_with(tmp_path, "one", fill), disk_with(tmp_path, "two", setuid)
    point = tmp_path / "m"
    point.mkdir()
    first = Disk(str(one), str(point), "ext4", "rw")
    volumes.mount(first)
    try:
        (tmp_path / "alias").symlink_to(point)  # which no configuration can tell
        with pytest.raises(MigrateError, match=r"lies in|Too many"):
            second = Disk(str(two), str(tmp_path / "alias/data"), "ext4", "rw")
            volumes.mount(second, [str(point), str(victim)])
        assert (victim / "passwd").read_text() == "root's"
        assert str(two) not in support.run("losetup", "-nO", "BACK-FILE")
    finally:
        volumes.unmount({"mount": str(point), "image": str(one)})


def test_what_comes_lies_where_no_other_user_gets(tmp_path: Path) -> None:
    support.needs("root")
    tmp_path.chmod(0o755)
    open_to_all = Path("/var/tmp") / f"pyploop-private-{os.getpid()}"
    open_to_all.mkdir(mode=0o755)
    try:
        for path in ("rootfs", "/rootfs"):
            with pytest.raises(MigrateError, match=f"chmod 0700 {open_to_all} on this host") as e:
                volumes.check_private(f"{open_to_all}/{path.lstrip('/')}")
            assert e.value.exit_code == 15
        volumes.check_private(f"{open_to_all}/new/rootfs")  # `new` is made for root alone
        open_to_all.chmod(0o700)
        volumes.check_private(f"{open_to_all}/rootfs")
        os.chown(open_to_all, support.NOBODY, 0)
        with pytest.raises(MigrateError):
            volumes.check_private(f"{open_to_all}/rootfs")
        (open_to_all / "link").symlink_to("/var")
        with pytest.raises(MigrateError):
            volumes.check_private(f"{open_to_all}/link/rootfs")
    finally:
        (open_to_all / "link").unlink(missing_ok=True)
        open_to_all.rmdir()


# ---- where mounts come to lie


def links_to_dev(root: Path) -> None:
    (root / "x").symlink_to("/dev")


def links_to_the_root(root: Path) -> None:
    (root / "x").symlink_to("sub/..")


def links_below_the_kernels(root: Path) -> None:
    (root / "x").symlink_to("sub/y")
    (root / "sub/y").symlink_to("../../../sys/kernel")


def links_in_what_is_bound(root: Path) -> None:
    (root / "data/x").symlink_to("../dev")


def links_round(root: Path) -> None:
    (root / "x").symlink_to("x")


def links_without_end(root: Path) -> None:
    """Each is the next one twice: 2 ** 30 in all."""
    for n in range(30):
        (root / f"x{n or ''}").symlink_to(f"x{n + 1}/../x{n + 1}")


def is_no_dev(root: Path) -> None:
    (root / "dev").rmdir()
    (root / "dev").symlink_to("sub")


def is_no_sys(root: Path) -> None:
    (root / "sys").symlink_to("/sub")


@pytest.mark.parametrize(
    ("how", "point"),
    [
        (links_to_dev, "/x"),
        (links_to_dev, "/x/null"),
        (links_to_the_root, "/x"),
        (links_below_the_kernels, "/x"),
        (links_in_what_is_bound, "/bound/x"),
        (links_round, "/x"),
        (links_without_end, "/x"),
        (is_no_dev, "/y"),
        (is_no_sys, "/y"),
    ],
)
def test_a_link_on_what_came_leads_no_mount_over_what_runc_masks_with(
    target: VzHost, bundle: Path, how: Callable[[Path], None], point: str
) -> None:
    """With a link to core_pattern in the place of /dev/null, runc 1.1 bound that over the
    files to be masked, writable, and gave it to the container as its standard output."""
    host = config.load(str(target.folder / "migrate.toml"))
    web = Runc(host, "web")
    tree = bundle / "rootfs"
    for name in ("sub", "data", "dev", "run", "var"):
        (tree / name).mkdir(parents=True)
    given = plain()

    def bind(destination: str) -> dict[str, Any]:
        return {"destination": destination, "source": "/their/rootfs/data", "options": ["bind"]}

    given["mounts"] += [bind("/bound"), bind(point)]
    # Honest ones: the image's own /dev is hidden, and /run is often called /var/run.
    given["mounts"] += [{"destination": "/dev/shm", "type": "tmpfs"}, bind("/var/run/y")]
    (tree / "dev/shm").symlink_to("/run/shm")
    (tree / "var/run").symlink_to("../../run")
    web._written = bundles.adapt(given, {}, {"/their/rootfs": str(tree)}, host.container("web"))
    web.release()
    (tree / "dev/shm").unlink()
    how(tree)
    with pytest.raises(MigrateError, match=r"symbolic link in the container|too many links") as e:
        web.release()
    assert e.value.exit_code == 15


def test_a_container_whose_files_keep_runc_waiting_does_not_count_as_running(
    target: VzHost, bundle: Path
) -> None:
    """runc reads /etc/passwd on the way to the container's program.  A FIFO there has no
    end; the source was told that the container runs, and would have removed its own."""
    support.needs("runc")
    settings = target.folder / "migrate.toml"
    text = settings.read_text().replace("command_timeout = 20", "command_timeout = 2")
    settings.write_text(text.replace(f'netns = "{target.folder}/netns"\n', ""))
    config = plain()
    with anysource.source(settings) as made:
        begun(made, config)
        made.send_items([("config.json", 0o644, json.dumps(config).encode())])
        (bundle / "rootfs/etc").mkdir(parents=True)
        os.mkfifo(bundle / "rootfs/etc/passwd")
        incoming = made._agent._incoming
        assert incoming is not None
        incoming._trees._last[0] = "tree 0.0"  # as if it had come by rsync
        try:
            with pytest.raises(MigrateError, match=r"runc .* run .*") as e:
                made.ask("start", timeout=20.0, run=True)
            assert e.value.exit_code == 7
            assert list((target.folder / "runc").iterdir()) == []
        finally:
            root = target.folder / "runc"
            support.run("runc", "--root", root, "delete", "--force", "web", check=False)
            shutil.rmtree(bundle / "rootfs", ignore_errors=True)
    assert not bundle.exists()


# ---- what was kept


def test_nobody_gets_what_another_source_has_sent_by_calling_itself_like_it(
    target: VzHost,
) -> None:
    config = target.folder / "migrate.toml"
    told = {"id": "a" * 32, "name": "hosta"}
    found = []
    for name in ("a", "b", "a"):
        with anysource.source(config, name) as made:
            made.check(CTID, "vzctl", {**FACTS, "source": told}, sizes=[0])
            found.append(made._agent._facts["source"])
    assert found[0] == found[2]
    assert found[0]["id"] != found[1]["id"]
    assert [f["name"] for f in found] == ["hosta"] * 3


# ---- a real container


def test_a_source_that_lies_about_a_running_container_gets_nothing_restored(
    two_hosts: Lab,
) -> None:
    requirements.check()
    a, b = two_hosts.a, two_hosts.b
    for host in (a, b):
        host.outside("/srv/shared").mkdir()
    before = files(b)
    with container.container(two_hosts, size=128 << 20):
        bundle = a.outside(container.BUNDLE) / "config.json"
        innocent = json.loads(bundle.read_text())
        for source, point in (("/srv/ct/rootfs/data", "/mnt"), ("/srv/shared", "/opt/shared")):
            bind = {"destination": point, "source": source, "options": ["rbind", "ro"]}
            innocent["mounts"].append(bind)
        innocent["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["reboot"], "action": "SCMP_ACT_ERRNO"}],
        }
        for host in (a, b):
            settings = host.outside(container.PYPLOOP_CONFIG)
            text = settings.read_text()
            text = text.replace("netns =", 'external = ["/srv/shared"]\nnetns =')
            settings.write_text(text)

        def restart(change: Callable[[dict[str, Any]], object]) -> None:
            """With another configuration than the one that is told."""
            config = json.loads(json.dumps(innocent))
            change(config)
            container.remove(a)
            bundle.write_text(json.dumps(config))
            container.start(a)
            bundle.write_text(json.dumps(innocent))

        def refused_live(code: int, named: str, *options: str) -> None:
            done = migrate(two_hosts, a, *options)
            assert done.code == code, done.errors
            assert named in done.errors
            assert only_side(two_hosts) is a
            assert not debris(b, before, runs_here=False)

        # Hooks in a case that only Go reads; before anything starts.
        bundle.write_text(
            json.dumps({**innocent, "Hooks": {"createRuntime": [{"path": "/bin/touch"}]}})
        )
        refused_live(15, "config.json: Hooks is not known to this pyploop")

        # A privileged process under an innocent configuration.
        sets = ("bounding", "effective", "permitted")
        restart(lambda c: [c["process"]["capabilities"][n].append("CAP_SYS_ADMIN") for n in sets])
        refused_live(15, "with CAP_SYS_ADMIN")

        # Files of the kernel that are writable for it.
        restart(lambda c: c["linux"].update({"readonlyPaths": [], "maskedPaths": []}))
        refused_live(15, "does not protect /proc/")

        # The host's IPC namespace.
        restart(
            lambda c: c["linux"].update(
                namespaces=[n for n in c["linux"]["namespaces"] if n["type"] != "ipc"]
            )
        )
        refused_live(15, "in the ipc namespace of the host")

        # The network of the host: no check but this one saw it.
        config = json.loads(json.dumps(innocent))
        config["linux"]["namespaces"].pop(1)
        bundle.write_text(json.dumps(config))
        refused_live(15, "has no network namespace", "--check-only")

        # Not trusted any more, or not yet.
        bundle.write_text(json.dumps(innocent))
        settings.write_text(text.replace("[trust]", "").replace("live = [", "# live = ["))
        refused_live(15, "run on this host: pyploop trust 10.77.0.11")
        settings.write_text(text)

        restart(lambda c: None)
        done = migrate(two_hosts, a)
        assert done.code == 0, done.errors
        assert only_side(two_hosts) is b
        root = b.outside(container.BUNDLE)
        assert root.stat().st_mode & 0o777 == 0o700
        assert not {"nosuid", "nodev"} & {*flags_in(b, container.ROOTFS)}


def flags_in(host: Any, point: Path) -> list[str]:
    lines = host.outside("/proc/1/mountinfo").read_text().splitlines()
    (line,) = [x for x in lines if x.split()[4] == str(point)]
    return list(line.split()[5].split(","))
