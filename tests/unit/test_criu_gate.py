# SPDX-License-Identifier: Apache-2.0
"""What stands between runc and CRIU: it asks before the container may run, and otherwise the
container is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from support import needs, wait_until

from pyploop.runtimes.runc import criu, criu_gate
from pyploop.runtimes.runc.early import Early

SECONDS = 30.0
_MESSAGES = """
def number(field, value):
    return bytes([field << 3]) + varint(value)
def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])
def block(field, data):
    return bytes([field << 3 | 2]) + varint(len(data)) + data
"""
_CRIU = """#!{python}
import os, socket, struct, subprocess, sys
{messages}
def note(text):
    with open({log!r}, "a") as f:
        f.write(text + "\\n")
sock = socket.socket(fileno=int(sys.argv[2]))
request = sock.recv(4096)
if request[1] == 10:
    sock.send(number(1, 10))
    sys.exit()
# As CRIU does it: in /proc of the process at the socket's other end.
pid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
for fd in request[5], request[8]:
    note(os.listdir(f"/proc/{{pid}}/fd/{{fd}}")[0])
container = subprocess.Popen(["sleep", "600"], start_new_session=True)
note(f"container {{container.pid}}")
note(f"criu {{os.getpid()}}")
for step in "setup-namespaces", "network-unlock", "pre-resume", "post-resume":
    notify = block(1, step.encode())
    if step == "setup-namespaces":
        notify += number(2, container.pid)
    sock.send(number(1, 7) + number(2, 1) + block(5, notify))
    note(f"{{step}} {{len(sock.recv(4096))}}")
sock.send(number(1, request[1]) + number(2, 1))
note("end")
"""
_RUNC = """#!{python}
import os, socket, subprocess, sys, time
{messages}
criu = sys.argv[sys.argv.index("--criu") + 1]
kind = int(sys.argv[sys.argv.index("--kind") + 1])
folders = [os.open(f, os.O_RDONLY) for f in ({images!r}, {work!r})]
for k in (10, kind):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen([criu, "swrk", str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    options = number(1, folders[0]) + b"\\x88\\x01" + varint(folders[1])
    ours.send(number(1, k) + block(2, options))
    while True:
        answer = ours.recv(4096)
        if not answer:
            sys.exit(process.wait())
        if answer[1] != 7:
            break
        if os.path.exists({gone!r}):
            os._exit(9)
        ours.send(number(1, 7) + number(3, 1))
    if process.wait():
        sys.exit(1)
"""


class Programs:
    """Stand-ins for runc and CRIU.  The images' folder has the file `image`, the other one the
    file `work`."""

    def __init__(self, folder: Path) -> None:
        self.log, self.gone = folder / "log", folder / "gone"
        self.log.touch()
        self.images, work = folder / "images", folder / "work"
        for path, name in ((self.images, "image"), (work, "work")):
            path.mkdir()
            (path / name).touch()
        self.runc, self.criu = folder / "runc", folder / "criu"
        for path, text in ((self.runc, _RUNC), (self.criu, _CRIU)):
            values = {"images": str(self.images), "work": str(work), "gone": str(self.gone)}
            path.write_text(
                text.format(python=sys.executable, log=str(self.log), messages=_MESSAGES, **values)
            )
            path.chmod(0o755)

    def waiting(self, what: Literal["dump", "restore"], agreed: Path | None = None) -> Early:
        """A runc that waits with CRIU's last request."""
        early = Early()
        early.agreed = agreed
        kind = {"dump": 1, "restore": 2}[what]
        argv = [str(self.runc), "--criu", "criu", "--kind", str(kind)]
        assert not early.start(self.images, what, argv, str(self.criu), ())
        assert early.ready(SECONDS)
        if what == "restore":
            early.advance()
            assert early.ready(SECONDS)
        assert early.kind == kind
        return early

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def pid(self, whose: str) -> int:
        """0: it was not started."""
        found = [line.split()[1] for line in self.lines() if line.startswith(f"{whose} ")]
        return int(found[0]) if found else 0

    def ended(self, whose: str) -> bool:
        try:
            state = Path(f"/proc/{self.pid(whose)}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state == "Z"

    def reached(self, step: str) -> bool:
        """It was let go on from there."""
        return any(line.startswith(f"{step} ") for line in self.lines())


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    needs("setpriv")
    made = Programs(tmp_path)
    yield made
    if made.pid("container") and not made.ended("container"):
        os.kill(made.pid("container"), signal.SIGKILL)


def test_a_restore_asks_at_two_steps_and_gets_runc_s_folders(programs: Programs) -> None:
    done: list[str] = []
    command, line = programs.waiting("restore").go()
    restoring = criu.Restoring(lambda: done.append("unlocked"))
    with line:
        status, _ = restoring.serve(command, line, SECONDS)
    assert status == 0
    assert restoring.unlocked and restoring.refusal is None
    assert done == ["unlocked"]
    assert programs.lines()[:2] == ["image", "work"]
    assert programs.lines()[-2:] == ["post-resume 4", "end"]
    assert not programs.ended("container")


def test_a_dump_asks_nothing(programs: Programs) -> None:
    command, line = programs.waiting("dump").go()
    line.close()
    assert command.wait(SECONDS)[0] == 0
    assert programs.lines()[-1] == "end"


@pytest.mark.parametrize("what", ["dump", "restore"])
def test_a_criu_that_got_nothing_to_do_ends_with_the_one_that_waits(
    programs: Programs, what: Literal["dump", "restore"]
) -> None:
    ended = programs.waiting(what).drop()
    assert ended is not None and ended[0] != 0
    folder = str(programs.criu)

    def running() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode().split("\0")
            except OSError:
                continue
            if folder in words and "swrk" in words:
                found.append(str(path))
        return found

    wait_until(lambda: not running(), "CRIU has ended", SECONDS)
    assert programs.lines() == []


@pytest.mark.invariant(number=4)
def test_a_refused_restore_ends_the_container_before_it_runs(programs: Programs) -> None:
    def refuse() -> None:
        raise RuntimeError("no")

    command, line = programs.waiting("restore").go()
    restoring = criu.Restoring(refuse)
    with line:
        status, _ = restoring.serve(command, line, SECONDS)
    assert status != 0
    assert str(restoring.refusal) == "no" and not restoring.unlocked
    wait_until(lambda: programs.ended("container"), "the container has ended", SECONDS)
    wait_until(lambda: programs.ended("criu"), "CRIU has ended", SECONDS)
    assert programs.reached("setup-namespaces") and not programs.reached("network-unlock")


@pytest.mark.invariant(number=4)
@pytest.mark.parametrize("agreed", [False, True])
def test_without_an_answer_before_it_runs_it_runs_only_if_all_of_its_pod_may(
    programs: Programs, tmp_path: Path, agreed: bool
) -> None:
    file = tmp_path / "all"
    command, line = programs.waiting("restore", file).go()
    with line:
        assert line.recv(64) == b"network-unlock"
        line.send(criu_gate.GO)
        assert line.recv(64) == b"pre-resume"
        if agreed:
            file.touch()
    assert (command.wait(SECONDS)[0] == 0) == agreed
    if agreed:
        assert not programs.ended("container")
    else:
        wait_until(lambda: programs.ended("container"), "the container has ended", SECONDS)


@pytest.mark.invariant(number=4)
def test_a_restore_that_has_nobody_to_ask_ends_the_container(programs: Programs) -> None:
    command, line = programs.waiting("restore").go()
    line.close()
    assert command.wait(SECONDS)[0] != 0
    wait_until(lambda: programs.ended("container"), "the container has ended", SECONDS)
    wait_until(lambda: programs.ended("criu"), "CRIU has ended", SECONDS)
    assert not programs.reached("network-unlock")


@pytest.mark.invariant(number=4)
def test_a_runc_that_has_gone_takes_the_container_with_it(programs: Programs) -> None:
    programs.gone.touch()
    command, line = programs.waiting("restore").go()
    with line:
        assert command.wait(SECONDS)[0] == 9
        assert line.recv(64) == b""  # not asked, and ended
    wait_until(lambda: programs.ended("container"), "the container has ended", SECONDS)
    wait_until(lambda: programs.ended("criu"), "CRIU has ended", SECONDS)
    assert not programs.reached("network-unlock")


@pytest.mark.invariant(number=4)
def test_a_criu_whose_relay_is_killed_does_not_go_on(programs: Programs) -> None:
    command, line = programs.waiting("restore").go()
    with line:
        assert line.recv(64) == b"network-unlock"
        relay = subprocess.run(
            ["ps", "-o", "ppid=", "-p", str(programs.pid("criu"))],
            capture_output=True,
            text=True,
            check=True,
        )
        os.kill(int(relay.stdout), signal.SIGKILL)
        assert command.wait(SECONDS)[0] != 0
    wait_until(lambda: programs.ended("criu"), "CRIU has ended", SECONDS)
    time.sleep(0.05)  # it would have gone on by now
    assert not programs.reached("network-unlock")


def test_a_message_that_is_none_is_the_last_answer() -> None:
    assert criu_gate.step_of(b"") == ("", 0)
    assert criu_gate.step_of(b"answer") == ("", 0)
    assert criu_gate.step_of(b"\x2a\xff") == ("", 0)
    assert criu_gate.kind_of(b"\xff" * 20) == criu_gate.kind_of(b"\x10\x0a") == 0
    assert criu_gate.kind_of(b"\x08\x02more") == criu_gate.kind_of(b"\x08\x02")
