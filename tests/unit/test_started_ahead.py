# SPDX-License-Identifier: Apache-2.0
"""runc is started ahead, with a program of ours in CRIU's place that waits; and the link goes
up and down without any process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import needs, run, tmpfs

from pyploop.runtimes.runc import criu_gate, link
from pyploop.runtimes.runc.early import Early

VERSION, DUMP, RESTORE = (bytes([8, kind]) for kind in (10, 1, 2))
SECONDS = 30.0
_CRIU = """#!{python}
import os, socket, sys
sock = socket.socket(fileno=int(sys.argv[2]))
kind = sock.recv(4096)[1]
with open({log!r}, "a") as f:
    f.write(f"criu {{kind}}\\n")
sock.send(b"answer %d of %d" % (kind, os.getpid()))
"""
_RUNC = """#!{python}
import socket, subprocess, sys
criu = sys.argv[sys.argv.index("--criu") + 1]
for kind in map(int, sys.argv[sys.argv.index("--kinds") + 1].split(",")):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [criu, "swrk", str(theirs.fileno())]
    process = subprocess.Popen(words, pass_fds=[theirs.fileno()])
    theirs.close()
    ours.send(bytes([8, kind]))
    answer = ours.recv(4096).decode()
    process.wait()
    if not answer:
        sys.exit(1)
    with open({log!r}, "a") as f:
        f.write(f"runc {{kind}}\\n")
    print(answer, process.pid, flush=True)
"""


class Programs:
    """Stand-ins for runc and CRIU, which note what they do."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.log.touch()
        self.images = folder / "images"
        self.images.mkdir()
        self.runc, self.criu = folder / "runc", folder / "a criu"
        for path, text in ((self.runc, _RUNC), (self.criu, _CRIU)):
            path.write_text(text.format(python=sys.executable, log=str(self.log)))
            path.chmod(0o755)

    def argv(self, *kinds: int) -> list[str]:
        return [str(self.runc), "--criu", "criu", "--kinds", ",".join(map(str, kinds))]

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path)


def start(programs: Programs, what: str, *kinds: int) -> Early:
    early = Early()
    assert not early.start(
        programs.images,
        "dump" if what == "dump" else "restore",
        programs.argv(*kinds),
        str(programs.criu),
        (),
    )
    return early


def gone(early: Early) -> tuple[int, str]:
    """How it ended, after it was let go on."""
    command, line = early.go()
    with line:
        return command.wait(SECONDS)


def test_a_dump_waits_when_the_version_is_known_and_then_goes_on(
    programs: Programs,
) -> None:
    early = start(programs, "dump", 10, 1)
    assert early.ready(SECONDS)
    assert early.kind == DUMP[1]
    assert programs.lines() == ["criu 10", "runc 10"]
    status, output = gone(early)
    assert status == 0
    assert programs.lines() == ["criu 10", "runc 10", "criu 1", "runc 1"]
    assert output.splitlines()[1].startswith("answer 1 of ")
    assert early.argv == []


def test_a_restore_that_goes_on_with_the_disks_waits_again_for_the_images(
    programs: Programs,
) -> None:
    early = start(programs, "restore", 10, 2)
    assert early.ready(SECONDS)
    assert early.kind == criu_gate.VERSION
    assert programs.lines() == ["criu 10"]
    early.advance()
    assert early.ready(SECONDS)
    assert early.kind == RESTORE[1]
    assert early.argv and early.advanced
    assert programs.lines() == ["criu 10", "runc 10"]
    assert gone(early)[0] == 0
    assert programs.lines() == ["criu 10", "runc 10", "criu 2", "runc 2"]
    assert not early.argv and not early.advanced


def test_a_restore_that_is_given_up_with_the_disks_ends_without_criu(programs: Programs) -> None:
    early = start(programs, "restore", 10, 2)
    assert early.ready(SECONDS)
    early.advance()
    ended = early.drop()
    assert ended is not None and ended[0] == 1
    assert "criu 2" not in programs.lines()


def test_a_runc_that_asks_for_no_version_first_is_known_by_it(programs: Programs) -> None:
    early = start(programs, "restore", 2)
    assert early.ready(SECONDS)
    assert early.kind == RESTORE[1]
    ended = early.drop()
    assert ended is not None and ended[0] == 1
    assert programs.lines() == []


def test_one_that_is_given_up_ends_without_criu(programs: Programs) -> None:
    early = start(programs, "dump", 10, 1)
    assert early.ready(SECONDS)
    ended = early.drop()
    assert ended is not None and ended[0] == 1
    assert programs.lines() == ["criu 10", "runc 10"]
    assert early.drop() is None


def test_one_that_has_ended_is_not_ready(programs: Programs) -> None:
    early = start(programs, "dump", 10)
    assert not early.ready(SECONDS)
    ended = early.drop()
    assert ended is not None and ended[0] == 0


def test_one_that_asks_for_nothing_is_waited_for_so_long_and_no_longer(
    programs: Programs,
) -> None:
    programs.runc.write_text("#!/bin/sh\nexec sleep 60\n")
    early = start(programs, "dump", 1)
    with pytest.raises(TimeoutError, match="did not ask CRIU for anything within 0"):
        early.ready(0.05)
    assert early.drop(patience=0.0) == (-1, "it did not end within 0 s")


def test_a_request_that_is_not_understood_waits_as_a_dump_does() -> None:
    assert criu_gate.kind_of(b"") == criu_gate.kind_of(b"\x10\x0a") == 0
    assert criu_gate.kind_of(VERSION + b"more") == criu_gate.VERSION


def test_why_nothing_can_be_started_is_told(programs: Programs) -> None:
    early = Early()
    argv = ["/no/such/runc", "--criu", "criu"]
    why = early.start(programs.images, "dump", argv, str(programs.criu), ())
    assert "No such file" in why
    # What needs no program of ours is started when it is time, and finds nothing in its way.
    assert early.argv == []
    assert early.drop() is None


def test_nothing_is_started_from_a_folder_without_programs(
    programs: Programs, tmp_path: Path
) -> None:
    needs("root")
    point = tmp_path / "noexec"
    point.mkdir()
    with tmpfs(point, 1 << 20):
        run("mount", "-o", "remount,noexec", point)
        images = point / "images"
        images.mkdir()
        why = Early().start(images, "dump", programs.argv(10, 1), str(programs.criu), ())
        assert why == f"{point} is mounted noexec"
        assert [p.name for p in point.iterdir()] == ["images"]


# ---- the link


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("ip link set ct0 up", ("ct0", True)),
        ("ip link set dev ct0 down", ("ct0", False)),
        ("ip link set ct0 up mtu 1400", None),
        ("ip -n other link set ct0 up", None),
        ("ip link set ct0 promisc", None),
        ("ip link set a-name-that-is-too-long up", None),
        ("ifconfig ct0 up now", None),
        ("true", None),
    ],
)
def test_only_a_plain_command_is_done_without_a_process(
    words: str, wanted: tuple[str, bool] | None
) -> None:
    needs("ip")
    assert link.plain(words.split()) == wanted


@pytest.mark.parametrize("where", ["in PATH", "by its path"])
def test_another_ip_than_the_system_s_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    own = tmp_path / "ip"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin")
    word = "ip" if where == "in PATH" else str(own)
    assert link.plain([word, "link", "set", "ct0", "up"]) is None


def test_a_link_goes_up_and_down_in_its_own_namespace() -> None:
    needs("root", "unshare", "ip")
    script = """
import subprocess
from pyploop.runtimes.runc import link
def flags():
    out = subprocess.run(["ip", "-o", "link", "show", "lo"], capture_output=True, text=True)
    return out.stdout.split("<")[1].split(">")[0].split(",")
assert "UP" not in flags()
link.set_up("lo", True)
assert "UP" in flags()
link.set_up("lo", False)
assert "UP" not in flags()
try:
    link.set_up("nolink0", True)
except OSError as e:
    print(e.strerror)
"""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stderr, done.stdout) == ("", "No such device\n")
