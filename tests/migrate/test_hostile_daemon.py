# SPDX-License-Identifier: Apache-2.0
"""The source's rsync, and a target whose rsync is none: it ends in time, and nothing
that it is told takes memory or disk without limit."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from treeloop import Copying, account, copying

from pyploop.diskcopy.options import Options
from pyploop.errors import MigrateError, PyploopError
from pyploop.migration import itemized, rsync
from pyploop.system.jobs import Job

FILES = 50


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    for name in ("one", "two"):
        (made / name).mkdir(parents=True)
        for n in range(FILES):
            (made / name / str(n)).write_bytes(b"x" * n)
    return made


_ASKING = """\
#!{python} -I
import os, sys
if "--daemon" not in sys.argv:
    os.execvp("rsync", ["rsync", *sys.argv[1:]])
os.write(1, b"@RSYNCD: 31.0 sha512 sha256 sha1 md5 md4\\n@RSYNCD: AUTHREQD challenge\\n")
while os.read(0, 4096):
    pass
"""
_TALKING = """\
#!{python} -I
import os, select, subprocess, sys
if "--daemon" not in sys.argv:
    os.execvp("rsync", ["rsync", *sys.argv[1:]])
p = subprocess.Popen(["rsync", *sys.argv[1:]], stdin=0, stdout=subprocess.PIPE)
def say(data):
    while data:
        select.select([], [1], [])  # rsync has made it non-blocking
        data = data[os.write(1, data):]
line = b""
while not line.startswith(b"@RSYNCD: OK"):
    say(line := p.stdout.readline() or sys.exit())
# Flags, checksums, the seed; then messages may come.
say(p.stdout.read(2))
say(n := p.stdout.read(1))
say(p.stdout.read(n[0] + 4))
text = {text}
message = (len(text) | 9 << 24).to_bytes(4, "little") + text
for _ in range({times}):
    say(message * 64)
while data := p.stdout.read1(65536):
    say(data)
"""


@contextlib.contextmanager
def against(folder: Path, source: Path, program: str, **values: object) -> Iterator[Copying]:
    """Copying to a target whose rsync is this program."""
    text = program.replace("{python}", sys.executable)
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", repr(value))
    (folder / "daemon").write_text(text)
    (folder / "daemon").chmod(0o755)
    with copying(folder, source, options=Options(stall=2), there=str(folder / "daemon")) as c:
        yield c


def test_a_daemon_that_asks_for_a_password_is_given_up_in_time(
    tmp_path: Path, source: Path
) -> None:
    """rsync's client asks the terminal or its input for one, without a timeout."""
    support.needs("root", "rsync")
    with against(tmp_path, source, _ASKING) as c:
        start = time.monotonic()
        with pytest.raises(MigrateError, match="io timeout"):
            c.trees.copy_while_running()
        assert time.monotonic() - start < 20  # two passes


def test_an_rsync_that_does_not_see_the_end_of_its_connection_is_ended(
    tmp_path: Path, source: Path
) -> None:
    """Whatever it waits for: the container is suspended until it has ended."""
    support.needs("root", "rsync")
    program = tmp_path / "rsync"
    program.write_text(_DEAF.replace("{python}", os.path.realpath(rsync._interpreter())))
    program.chmod(0o755)
    with copying(tmp_path, source, rsync=str(program), there="rsync") as c:
        c.trees.prepare_last()
        job = Job(c.trees.finish).start()
        with pytest.raises(TimeoutError):
            job.join(1.5)
        c.cut()
        with pytest.raises(PyploopError):
            job.join(10)


_DEAF = """\
#!{python} -I
import os, shlex, sys, time
if "--version" in sys.argv:
    os.execvp("rsync", sys.argv)
(shell,) = (w.removeprefix("--rsh=") for w in sys.argv if w.startswith("--rsh="))
words = [*shlex.split(shell), "host", "command"]
if os.fork() == 0:
    os.execv(words[0], words)
time.sleep(60)
"""


@pytest.mark.parametrize("text", [b"y" * 1023 + b"\n", b"y" * 1024])
def test_what_a_daemon_says_is_not_kept(tmp_path: Path, source: Path, text: bytes) -> None:
    """12 MiB a pass, in lines or in one: neither on the disk nor in memory."""
    support.needs("root", "rsync")
    with against(tmp_path, source, _TALKING, text=text, times=200) as c:
        tracemalloc.start()
        try:
            c.trees.copy_while_running()
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert most < 6 << 20
        assert c.events[0]["files"] in (2 * FILES - 1, 2 * FILES)  # one is behind the text
        c.trees.prepare_last()
        c.finish()
        assert account(c.source) == account(c.target)


def test_the_names_that_a_daemon_makes_up_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is forgotten is compared by contents, which is as right."""
    monkeypatch.setattr(itemized, "KEPT_NAMES", 10 * (itemized.EACH + 4))
    found = itemized.Itemized()
    try:
        for n in range(1000):
            found.took(b"<f+++++++++ %04d\n" % n)
        assert (found.sent, len(found.names), found.linked) == (1000, 10, False)
        found.took(b"hf+++++++++ " + b"z" * 10 * itemized.LONGEST_LINE)
        found.took(b"z\n<f.st...... \\#134\\#777\nno item\n")
        assert (found.sent, len(found.names), found.linked) == (1001, 10, False)
    finally:
        found.close()


def test_only_the_names_in_doubt_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are known, and afterwards."""
    monkeypatch.setattr(itemized, "KEPT_NAMES", 10 * (itemized.EACH + 4))
    found = itemized.Itemized()
    try:
        for n in range(5):
            found.took(b"<f+++++++++ %04d\n" % n)
        found.only({b"0003", b"0500"})
        for n in range(5, 1000):
            found.took(b"<f+++++++++ %04d\n" % n)
        assert (found.sent, found.names) == (1000, {b"0003", b"0500"})
        found.only(frozenset())
        assert not found.names
    finally:
        found.close()


def test_second_names_that_a_daemon_makes_up_are_bounded_over_all_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of more than these any may be a second name, and all are compared."""
    monkeypatch.setattr(itemized, "KEPT_NAMES", 10 * (itemized.EACH + 4))
    linked = itemized.Names()
    for n in range(11):
        found = itemized.Itemized()
        found.second_names = linked
        try:
            assert linked.complete
            found.took(b"hf+++++++++ %04d\nhf+++++++++ 0000\n" % n)
            assert found.linked
        finally:
            found.close()
    assert len(linked) == 10 and not linked.complete
