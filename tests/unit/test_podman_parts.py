# SPDX-License-Identifier: Apache-2.0
"""The parts of Podman's runtime that need no Podman: what a source may say, the files that are
exchanged, and what stands in CRIU's place."""

from __future__ import annotations

import copy
import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import needs

from pyploop.errors import MigrateError
from pyploop.migration.target import settle
from pyploop.runtimes.checks import Checks
from pyploop.runtimes.config import HostConfig
from pyploop.runtimes.podman import criu_stub, extras, fitting, links, movable, watches
from pyploop.runtimes.podman.command import Podman
from pyploop.runtimes.podman.found import Found
from pyploop.runtimes.podman.host import PodmanHost, number_of
from pyploop.runtimes.podman.image import Image
from pyploop.runtimes.podman.placed import Placed
from pyploop.runtimes.podman.runtime import PodmanRuntime
from pyploop.runtimes.registry import make_runtime, split
from pyploop.system import kernel
from pyploop.undo.journal import Journal

ID, IMAGE, LAYER = "a" * 64, "b" * 64, "c" * 64
FACTS: dict[str, Any] = {
    "external": ["/etc/ssl"],
    "podman": {
        "host": {"version": "4.3.1"},
        "config": {
            "id": ID,
            "name": "web",
            "spec": {},
            "rootfsImageID": IMAGE,
            "newNetworks": {"lan": {}},
        },
        "image": {"layers": [f"sha256:{LAYER}"], "names": ["localhost/web:1"]},
        "network": {"lan": {"interfaces": {"eth0": {"mac_address": "02:00:00:00:00:01"}}}},
        "root": "/graph/overlay/x/merged",
        "volumes": {"data": "/graph/volumes/data/_data"},
        "binds": ["/srv/web"],
        "owned": ["/run/x/hosts"],
    },
}


def test_what_a_source_says_of_a_container_is_understood() -> None:
    found = fitting.coming(FACTS)
    assert (found.id, found.networks) == (ID, {"lan": {}})
    assert found.image == Image(IMAGE, (LAYER,), ("localhost/web:1",))
    assert found.addresses == ["02:00:00:00:00:01"]


WRONG: dict[str, tuple[tuple[str, ...], Any]] = {
    "an ID that is a path": (("config", "id"), "../../etc"),
    "an image that is an option": (("config", "rootfsImageID"), "--all"),
    "a layer that leads upwards": (("image", "layers"), ["../" + LAYER]),
    "a name of an image that is an option": (("image", "names"), ["--all"]),
    "a volume that leads upwards": (("volumes",), {"../x": "/graph/volumes/x/_data"}),
    "a port of no network": (("config", "newPortMappings"), [{"host_port": 10**30}]),
    "a port on an odd address": (("config", "newPortMappings"), [{"host_ip": "\0"}]),
    "a port that is only a text": (("config", "newPortMappings"), ["80"]),
    "a network that is an option": (("config", "newNetworks"), {"--help": {}}),
    "networks in a list": (("config", "newNetworks"), ["lan"]),
    "a secret that is an option": (("config", "secret_env"), {"A": {"name": "--help"}}),
    "a volume that is an option": (("volumes",), {"--all": "/graph/volumes/x/_data"}),
    "a folder that leads upwards": (("binds",), ["/srv/../etc"]),
    "a root that is relative": (("root",), "etc"),
    "an address that is a rule": (
        ("network",),
        {"lan": {"interfaces": {"eth0": {"mac_address": "1 drop; accept"}}}},
    ),
    "no configuration": (("config",), None),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_description_that_is_none_is_refused(what: str) -> None:
    keys, value = WRONG[what]
    facts = copy.deepcopy(FACTS)
    at = facts["podman"]
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    with pytest.raises(MigrateError) as failed:
        fitting.coming(facts)
    assert failed.value.exit_code == 15


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ((None, "podman:web"), ("podman", "web")),
        (("podman", "podman:web"), ("podman", "web")),
        (("podman", "web"), ("podman", "web")),
        (("runc", "web"), ("runc", "web")),
        ((None, "web"), (None, "web")),
    ],
)
def test_the_prefix_names_the_runtime(
    written: tuple[str | None, str], found: tuple[str | None, str]
) -> None:
    assert split(*written) == found


@pytest.mark.parametrize("name", ["--all", "../x", "a b", ""])
def test_a_name_that_podman_could_take_for_something_else_is_an_error(name: str) -> None:
    with pytest.raises(MigrateError, match="not the name of a container"):
        make_runtime(HostConfig(), "podman", name)


def test_versions_are_compared_as_numbers() -> None:
    assert number_of("4.10.1") > number_of("4.9.0")
    assert number_of("5.0.0-dev") == (5, 0)
    assert number_of("unknown") == ()


def test_what_podman_prints_is_read_behind_its_warnings(tmp_path: Path) -> None:
    program = tmp_path / "podman"
    program.write_text("#!/bin/sh\necho '[warn] something {odd'\necho '[{\"Id\": 1}]'\n")
    program.chmod(0o755)
    assert Podman(str(program), 10.0).inspected("container", "web") == {"Id": 1}


# ---- files


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Podman's places after it has made the container, and what has come."""
    for name in (
        "overlay/l/diff",
        "overlay/l/merged",
        "volumes/data/_data",
        "in/root",
        "in/volume-0",
    ):
        (tmp_path / name).mkdir(parents=True)
    for name in ("overlay/l/diff", "volumes/data/_data"):
        (tmp_path / name / "made").touch()
    for name in ("in/root", "in/volume-0"):
        (tmp_path / name / "came").touch()
    return tmp_path


def placed(graph: Path) -> Placed:
    return Placed(str(graph), str(graph / "in"), [str(graph / "volumes/data/_data")])


def names(*folders: Path) -> list[list[str]]:
    return [sorted(os.listdir(f)) if f.exists() else [] for f in folders]


def test_what_has_come_takes_its_place_and_comes_back_from_there(graph: Path) -> None:
    needs("root")
    diff, data = graph / "overlay/l/diff", graph / "volumes/data/_data"
    one = placed(graph)
    for _ in range(2):  # it may be repeated
        one.put(str(graph / "overlay/l/merged"))
        assert names(diff, data) == [["came"], ["came"]]
    for _ in range(2):
        placed(graph).take_back(str(graph / "overlay/l/merged"))
        assert names(graph / "in/root", graph / "in/volume-0") == [["came"], ["came"]]
        assert sorted(os.listdir(graph / "in")) == ["root", "volume-0"]


def test_after_the_restore_nothing_is_left_of_the_way(graph: Path) -> None:
    needs("root")
    one = placed(graph)
    one.put(str(graph / "overlay/l/merged"))
    one.tidy()
    assert not (graph / "in").exists()


@pytest.mark.invariant(number=4)
def test_what_was_renamed_is_on_the_disk_before_the_source_may_remove_its_own(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def sync(fd: int, path: str) -> None:
        synced.append(path)

    monkeypatch.setattr(kernel, "syncfs", sync)
    runtime = PodmanRuntime.__new__(PodmanRuntime)
    runtime.instance = {"graph": str(graph)}
    log = Journal.create("a migration", graph, side="target")
    assert settle.complete(log, runtime) == []
    assert synced == [str(graph)]


@pytest.mark.parametrize("root", ["/etc", "/graph/overlay/../../etc/merged", "/graph/overlay/l"])
def test_only_an_overlay_of_podman_s_is_taken_for_the_root(root: str) -> None:
    with pytest.raises(MigrateError, match="not one of its overlays"):
        Placed("/graph", "/graph/in", []).check_root(root)


@pytest.mark.parametrize(
    ("start", "whole"), [(3, "onetwo"), (0, "two"), (None, "one")], ids=["end", "cut", "no end"]
)
def test_the_output_is_put_together(tmp_path: Path, start: int | None, whole: str) -> None:
    before, log = tmp_path / "before", tmp_path / "ctr.log"
    before.write_text("one")
    if start is not None:
        (tmp_path / f"{extras.LOG}{start}").write_text("two")
    extras.unpack_log(str(log), before, tmp_path)
    assert log.read_text() == whole
    assert not before.exists()


# ---- links, CRIU


def test_watched_files_of_an_overlay_are_named_for_criu(tmp_path: Path) -> None:
    """And none with a name that could be another option of CRIU's."""
    needs("root", "mount")
    for name in ("lower/tmp/in", "lower/x\nlink-remap", "upper", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)
    merged = tmp_path / "merged"
    layers = ",".join(f"{n}dir={tmp_path / n}" for n in ("lower", "upper", "work"))
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, merged], check=True)
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_CLOEXEC)
    try:
        (merged / "new").mkdir()
        for name in ("", "tmp", "tmp/in", "new", "x\nlink-remap", "../lower"):
            assert libc.inotify_add_watch(watch, os.fsencode(merged / name), 0x100) > 0
        found = watches.paths([os.getpid()])
        assert found == [str(merged / "new"), str(merged / "tmp")]
    finally:
        os.close(watch)
        subprocess.run(["umount", merged], check=True)


def test_several_links_are_set_by_one_command() -> None:
    assert links.set_all([], True) == ()
    assert links.set_all(["veth1"], False) == ("ip", "link", "set", "veth1", "down")
    shell, _, text = links.set_all(["veth1", "veth2"], True)
    assert shell == "sh"
    assert text.count("ip link set veth") == 2


def test_in_criu_s_place_a_dump_is_answered_and_stops_nothing(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = os.open(tmp_path, os.O_RDONLY)
    # criu_req: type DUMP, opts {images_dir_fd, pid}
    inner = bytes((0x08, folder, 0x10, 1))
    with ours, theirs:
        ours.send(bytes((0x08, criu_stub.DUMP, 0x12, len(inner))) + inner)
        os.set_inheritable(theirs.fileno(), True)
        command = [sys.executable, "-I", "-S", criu_stub.__file__, "/nonexistent", "swrk"]
        subprocess.run([*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], check=True)
        assert ours.recv(64) == criu_stub.ANSWER
    os.close(folder)
    assert os.listdir(tmp_path) == ["inventory.img"]


def test_anything_else_is_criu_s_to_answer(tmp_path: Path) -> None:
    criu = tmp_path / "criu"
    criu.write_text('#!/bin/sh\necho "criu $*"\n')
    criu.chmod(0o755)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(bytes((0x08, 10)))  # VERSION
        command = [sys.executable, "-I", "-S", criu_stub.__file__, str(criu), "swrk"]
        done = subprocess.run(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.startswith("criu swrk ")


# ---- checks for states that the test hosts cannot be in: no crun and no journald is there


def test_a_container_of_another_runtime_is_refused(tmp_path: Path) -> None:
    raw = {"OCIRuntime": "crun", "HostConfig": {}}
    found = Found(ID, "web", "running", "", "", str(tmp_path), "", "", 0, (), (), raw)
    here = PodmanHost("4.3.1", "/g", "/r", "/v", "overlay", "v1", "cgroupfs", False, "", "")
    checks = Checks()
    movable.check(Podman("/no/podman", 1.0), found, here, checks)
    (failed,) = [f for f in checks.failed if f.name == "podman-runtime"]
    assert "web is run by crun" in failed.message and "--runtime runc" in failed.hint


def test_output_for_journald_needs_journald_on_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = copy.deepcopy(FACTS)
    facts["podman"]["config"] |= {"logDriver": "journald", "newNetworks": {}}
    here = PodmanHost("4.3.1", "/g", "/r", "/v", "overlay", "v1", "cgroupfs", False, "", "")
    answers = tmp_path / "podman"
    answers.write_text("#!/bin/sh\nexit 1\n")  # nothing of that name is here
    answers.chmod(0o755)
    journal = tmp_path / "socket"
    monkeypatch.setattr(fitting, "JOURNAL", str(journal))
    for there in (False, True):
        if there:
            journal.touch()
        checks = Checks()
        podman = Podman(str(answers), 10.0)
        fitting.check(podman, "web", here, fitting.coming(facts), checks, live=True)
        assert checks.has("podman-log") is not there
