# SPDX-License-Identifier: Apache-2.0
"""Every row of both tables of the D1 facts (docs/reference/exit-codes.md), through the
real command line: the exit code, one clear line, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fakeploop
import pytest
import support
from support import FAILURE, SUCCESS, d1_end, d1_frame, d1_header, d1_parse, d1_replay, d1_sync

HELLO, HELLO_REPLY = b"PYP\x01", b"PYPLOOP\x01"
DATA = bytes(range(1, 255)) * 100


@dataclass
class Ended:
    code: int
    out: bytes
    err: str

    def one_line(self, *words: str) -> None:
        """stderr is one line that has these words, and no traceback."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err, self.err


def pyploop(
    *args: object,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    fds: Sequence[int] = (),
    prefix: Sequence[str] = (),
    env: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
    timeout: float = 30,
) -> Ended:
    done = subprocess.run(
        [*prefix, *support.pyploop_cmd(), "-v-1", *map(str, args)],
        stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, pass_fds=fds, timeout=timeout,
        env=support.pyploop_env(env), preexec_fn=before, check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout or b"", done.stderr.decode())


@contextlib.contextmanager
def fed(stream: bytes, *, sock: bool = False) -> Iterator[int]:
    """A descriptor from which the stream can be read, then the end."""
    if sock:
        a, b = socket.socketpair()
        r, w = a.detach(), b.detach()
    else:
        r, w = os.pipe()

    def feed() -> None:
        left = stream
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while left:
                left = left[os.write(w, left) :]
        os.close(w)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield r
    finally:
        os.close(r)
        thread.join()


def receive(target: Path, stream: bytes, *args: object, **more: object) -> Ended:
    with fed(stream) as fd:
        return pyploop("copy", "-d", target, *args, stdin=fd, **more)  # type: ignore[arg-type]


GOOD = d1_frame(0, DATA) + d1_end()

BROKEN = {
    "nothing at all": (b"", 6, "without END"),
    "no END": (d1_frame(0, DATA), 6, "without END"),
    "a short header": (d1_frame(0, DATA) + b"\x3d\xac\xc0", 6, "without END"),
    "truncated data": (d1_frame(0, DATA)[:-1], 6, "without END"),
    "a truncated SYNC": (d1_sync()[:-1], 6, "without END"),
    "a bad marker": (d1_frame(0, DATA) + d1_header(0, 0, 0x1234), 13, "frame 1"),
    "a D2 stream on a pipe": (
        d1_header(0, 0, 0x4CC0AC3E) + bytes(40),
        38,
        "answered on the socket",
    ),
    "D2 in D1": (d1_frame(0, DATA) + d1_header(0, 0, 0x4CC0AC3E), 13, "D2 frame in a D1 stream"),
    "text": (b"Welcome to host.example.com\n" * 9, 13, "bad marker"),
    "4 GiB - 1 of data": (d1_header(0xFFFFFFFF, 0) + DATA, 5, "4294967295"),
    "2 GiB of data": (d1_header(1 << 31, 0) + DATA, 5, "2147483648"),
    "a frame of 64 MiB + 1": (d1_header((64 << 20) + 1, 0), 5, "67108865"),
    "a position of 2^64 - 1": (d1_frame((1 << 64) - 1, DATA), 7, "position"),
    "a position past 2^63 - size": (d1_frame((1 << 63) - 100, DATA), 7, "position"),
    "a position of 2^62": (d1_frame(1 << 62, DATA) + d1_end(), 7, "cannot write"),
    "zeroes at 2^62": (d1_frame(1 << 62, bytes(8192)) + d1_end(), 7, "too large"),
}


@pytest.mark.parametrize("case", list(BROKEN))
@pytest.mark.invariant(number=5)
def test_receiver_refuses_a_broken_stream(tmp_path: Path, case: str) -> None:
    stream, code, word = BROKEN[case]
    got = receive(tmp_path / "image", stream)
    assert got.code == code, got.err
    got.one_line(word)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("datagrams", "SOCK_STREAM"),
        ("packets", "SOCK_STREAM"),
        ("listening", "SOCK_STREAM"),
        ("the wrong end of a pipe", "writing only"),
    ],
)
def test_receiver_refuses_what_carries_no_bytes(tmp_path: Path, kind: str, word: str) -> None:
    """It would wait for ever, or lose what it does not read of a message."""
    r, w = os.pipe()
    kinds = {"datagrams": socket.SOCK_DGRAM, "packets": socket.SOCK_SEQPACKET}
    a, b = socket.socketpair(socket.AF_UNIX, kinds.get(kind, socket.SOCK_STREAM))
    with a, b, socket.socket() as listening:
        listening.listen()
        a.send(d1_frame(0, DATA[:1000]))
        fd = {"listening": listening.fileno(), "the wrong end of a pipe": w}.get(kind, b.fileno())
        got = pyploop("copy", "-d", tmp_path / "image", stdin=fd)
    os.close(r)
    os.close(w)
    assert got.code == 38, got.err
    got.one_line(word)
    assert list(tmp_path.iterdir()) == []


def test_receiver_takes_a_good_stream_and_nothing_past_its_end(tmp_path: Path) -> None:
    r, w = os.pipe()
    os.write(w, GOOD + b"rest")
    got = pyploop("copy", "-d", tmp_path / "image", stdin=r)
    assert (got.code, got.out, got.err) == (0, b"", "")
    assert (tmp_path / "image").read_bytes() == DATA
    assert (tmp_path / "image").stat().st_mode & 0o7777 == 0o600
    assert os.read(r, 100) == b"rest"
    os.close(r)
    os.close(w)


def test_receiver_never_touches_a_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("image", "dangling"):
        got = receive(tmp_path / name, GOOD)
        assert got.code == 1
        got.one_line("File exists", "Hint: ")
    assert (tmp_path / "image").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("name", "word"),
    [
        (".", "exists"),
        ("missing/image", "No such file"),
        ("file/image", "Not a directory"),
        ("x" * 256, "too long"),
    ],
)
def test_receiver_cannot_create_such_a_file(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / "file").touch()
    got = receive(tmp_path / name, GOOD)
    assert got.code == 1, got.err
    got.one_line(word)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.root
def test_receiver_on_a_read_only_or_full_file_system(tmp_path: Path) -> None:
    support.needs("root", "mount")
    with support.tmpfs(tmp_path / "m", 1 << 20) as folder:
        full = b"".join(d1_frame(n << 20, os.urandom(1 << 20)) for n in range(3))
        got = receive(folder / "image", full + d1_end())
        assert got.code == 7
        got.one_line("No space left")
        assert list(folder.iterdir()) == []
        support.run("mount", "-o", "remount,ro", folder)
        got = receive(folder / "image", GOOD)
        assert got.code == 1
        got.one_line("Read-only")


@pytest.mark.root
def test_local_copy_onto_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    support.needs("root", "mount")
    (tmp_path / "src").write_bytes(os.urandom(3 << 20))
    with support.tmpfs(tmp_path / "m", 1 << 20) as folder:
        got = pyploop("copy", "-s", tmp_path / "src", "-d", folder / "image")
        assert got.code == 7
        got.one_line("has 3.0 MiB of data", "has room for 1.0 MiB; nothing was copied")
        got = pyploop("copy", "-s", tmp_path / "src", "-d", folder / "image", "--reserve", "0")
        assert got.code == 7
        got.one_line("No space left")
        assert list(folder.iterdir()) == []


def test_receiver_over_its_file_size_limit_ends_with_7(tmp_path: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    stream = d1_frame(0, os.urandom(200_000)) + d1_end()
    got = receive(tmp_path / "image", stream, before=limit)
    assert got.code == 7
    got.one_line("File too large")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ["-x"], ["-i"], ["extra"], ["-i", "abc"], ["-f", "99"], ["-i", "99"], ["-v"],
        ["--readers", "65"], ["--timeout", "soon"],
    ],
)  # fmt: skip
def test_wrong_arguments_end_with_38(tmp_path: Path, args: list[str]) -> None:
    got = receive(tmp_path / "image", GOOD, *args)
    assert got.code == 38
    assert got.err
    assert "Traceback" not in got.err
    assert list(tmp_path.iterdir()) == []


def test_neither_source_nor_target_is_said_before_the_usage() -> None:
    got = pyploop("copy")
    assert got.code == 38
    assert got.err.splitlines()[0] == "Either -s or -d is required"
    assert pyploop("copi").code == pyploop().code == pyploop("-q", "copy").code == 38


def test_the_vzmigrate_probe() -> None:
    """38 when stdin is /dev/null, 1 when it is a pipe: what ploop 1.15 says."""
    probe = ["copy", "-i0", "-f1", "-d", "/dev/null"]
    assert pyploop(*probe).code == 38
    r, w = os.pipe()
    os.close(w)
    assert pyploop(*probe, stdin=r).code == 1
    os.close(r)


def test_receiver_whose_feedback_reader_is_gone_ends_with_7(tmp_path: Path) -> None:
    r, w = os.pipe()
    os.close(r)
    stream = d1_frame(0, DATA) + d1_sync() + d1_end()
    got = receive(tmp_path / "image", stream, "-f", w, fds=[w])
    os.close(w)
    assert got.code == 7
    got.one_line("answer")
    assert list(tmp_path.iterdir()) == []


def test_receiver_answers_each_sync_and_a_c_sender_no_end(tmp_path: Path) -> None:
    r, w = os.pipe()
    stream = d1_sync(b"abcd") + d1_frame(0, DATA) + d1_sync(HELLO) + d1_end()
    got = receive(tmp_path / "image", stream, "-f", w, fds=[w])
    os.close(w)
    assert (got.code, os.read(r, 100)) == (0, SUCCESS * 2)
    os.close(r)
    assert (tmp_path / "image").read_bytes() == DATA


def test_receiver_answers_end_of_a_pyploop_sender_when_the_file_is_there_defect_7(
    tmp_path: Path,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(d1_sync(HELLO) + GOOD)
        child = subprocess.Popen(
            [*support.pyploop_cmd(), "-v-1", "copy", "-d", str(tmp_path / "image")],
            stdin=theirs.fileno(), env=support.pyploop_env(),
        )  # fmt: skip
        theirs.close()
        got = b""
        while len(got) < 16:
            got += ours.recv(16)
        assert got == HELLO_REPLY + SUCCESS
        assert (tmp_path / "image").read_bytes() == DATA
        assert child.wait(20) == 0


def test_silent_sender_is_given_up(tmp_path: Path) -> None:
    r, w = os.pipe()
    os.write(w, d1_frame(0, DATA))
    got = pyploop("copy", "-d", tmp_path / "image", "--timeout", "0.3", stdin=r)
    os.close(r)
    os.close(w)
    assert got.code == 6
    got.one_line("sends nothing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["before any byte", "in a frame", "after a SYNC"])
def test_receiver_dies_by_its_signal_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    r, w = os.pipe()
    fb_r, fb_w = os.pipe()
    child = subprocess.Popen(
        [*support.pyploop_cmd(), "-v4", "copy", "-d", str(tmp_path / "image"), "-f", str(fb_w)],
        stdin=r, stderr=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fb_w],
        env=support.pyploop_env(),
    )  # fmt: skip
    os.close(r)
    os.close(fb_w)
    assert child.stdout and b"Receiving" in child.stdout.readline()
    if moment == "in a frame":
        os.write(w, d1_frame(0, DATA)[:-5])
    elif moment == "after a SYNC":
        os.write(w, d1_frame(0, DATA) + d1_sync())
        assert os.read(fb_r, 8) == SUCCESS
    child.send_signal(number)
    _, err = child.communicate(timeout=20)
    os.close(w)
    os.close(fb_r)
    assert child.returncode == -number
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


# ---- senders


class Peer:
    """Takes a sender's stream and answers each SYNC as it is told to."""

    def __init__(self, answers: Sequence[bytes | None], read_frames: int | None = None) -> None:
        """None: close the feedback instead of answering.  read_frames: close
        the stream after so many."""
        self.stream_r, self.stream_w = os.pipe()
        self.fb_r, self.fb_w = os.pipe()
        self.got = b""
        self._answers = list(answers)
        self._frames = read_frames
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _exactly(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            part = os.read(self.stream_r, n - len(data))
            if not part:
                raise EOFError
            data += part
        self.got += data
        return data

    def _main(self) -> None:
        feedback: int | None = self.fb_w
        with contextlib.suppress(EOFError):
            while self._frames is None or self._frames > 0:
                _, size, _ = support.D1_HEADER.unpack(self._exactly(16))
                self._exactly(size)
                if self._frames is not None:
                    self._frames -= 1
                if size == 4 and self._answers and feedback is not None:
                    answer = self._answers.pop(0)
                    if answer is None:
                        os.close(feedback)
                        feedback = None
                    elif answer:
                        os.write(feedback, answer)
                        if len(answer) < 8:
                            os.close(feedback)
                            feedback = None
        os.close(self.stream_r)
        if feedback is not None:
            os.close(feedback)

    def run(self, source: Path | str, *args: object, **more: object) -> Ended:
        got = pyploop(
            "copy", "-s", source, "-o", self.stream_w, "-f", self.fb_r, *args,
            fds=[self.stream_w, self.fb_r], **more,  # type: ignore[arg-type]
        )  # fmt: skip
        os.close(self.stream_w)
        self._thread.join()
        os.close(self.fb_r)
        return got


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(os.urandom((1 << 20) + 4))
    return path


def test_sender_speaks_d1_to_a_c_receiver(source: Path) -> None:
    peer = Peer([SUCCESS] * 9)
    assert peer.run(source).code == 0
    frames = d1_parse(peer.got)
    assert frames[0].data == HELLO
    assert frames[-1].is_end
    # A receiver before 1.11 writes what a SYNC carries at position 0.
    first = source.read_bytes()[:4]
    assert {f.data for f in frames[1:] if f.is_sync} == {first}
    assert d1_replay(frames) == source.read_bytes()


@pytest.mark.parametrize(
    ("answer", "code"),
    [(FAILURE, 16), (b"garbage!", 13), (b"SUCC", 13), (None, 13)],
    ids=["FAILURE", "garbage", "short", "EOF"],
)
@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.invariant(number=2)
def test_sender_with_a_bad_answer(source: Path, answer: bytes | None, code: int, good: int) -> None:
    peer = Peer([*[SUCCESS] * good, answer])
    got = peer.run(source, "-F", "true")
    assert got.code == code, got.err
    got.one_line()
    assert not any(f.is_end for f in d1_parse(peer.got))


@pytest.mark.invariant(number=2)
def test_sender_learns_that_the_last_sync_of_a_pyploop_receiver_failed_defect_7(
    source: Path,
) -> None:
    class AtEnd(Peer):
        def _main(self) -> None:
            with contextlib.suppress(EOFError):
                size = 1
                while size:
                    _, size, _ = support.D1_HEADER.unpack(self._exactly(16))
                    self._exactly(size)
                    if size == 4:
                        os.write(self.fb_w, HELLO_REPLY if self.got.endswith(HELLO) else SUCCESS)
                os.write(self.fb_w, FAILURE)
            os.close(self.stream_r)
            os.close(self.fb_w)

    got = AtEnd([]).run(source)
    assert got.code == 16
    got.one_line("durable")


def test_sender_gives_a_silent_peer_up_defect_2(source: Path) -> None:
    got = Peer([b""]).run(source, "--timeout", "0.5")
    assert got.code == 6
    got.one_line("no answer")


def test_sender_whose_peer_closed_ends_with_7_defect_1(source: Path) -> None:
    for frames in (0, 1):
        got = Peer([SUCCESS] * 9, read_frames=frames).run(source)
        assert got.code in ((7,) if frames == 0 else (7, 13))
        got.one_line("closed")


def test_sender_whose_peer_closes_the_one_socket_instead_of_an_answer_ends_with_7(
    source: Path,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            [*support.pyploop_cmd(), "-v-1", "copy", "-s", str(source)],
            stdin=subprocess.DEVNULL, stdout=theirs.fileno(), stderr=subprocess.PIPE,
            text=True, env=support.pyploop_env(),
        )  # fmt: skip
        theirs.close()
        with child:
            # All of it is read, so this is an orderly end and no reset.
            assert ours.recv(len(d1_sync(HELLO)), socket.MSG_WAITALL) == d1_sync(HELLO)
            ours.close()
            _, err = child.communicate(timeout=20)
    assert child.returncode == 7
    assert err == "the receiver closed the stream (see its own message)\n"


@pytest.mark.invariant(number=2)
def test_sender_whose_peer_leaves_before_end_does_not_succeed_defect_1(source: Path) -> None:
    full = Peer([SUCCESS] * 9)
    assert full.run(source).code == 0
    count = len(d1_parse(full.got))
    got = Peer([SUCCESS] * 9, read_frames=count - 1).run(source, "--before-thaw", "true")
    # END may still fit the pipe of a peer that is going: only an
    # acknowledgement tells, so here it is the last SYNC that must fail.
    assert got.code in (0, 7)
    got = Peer([SUCCESS, None], read_frames=count - 2).run(source)
    assert got.code in (7, 13)


@pytest.mark.parametrize(
    "command", ["exit 3", "/no/such/command", "kill -9 $$"], ids=["fails", "missing", "killed"]
)
def test_sender_whose_stop_command_fails_ends_with_12(source: Path, command: str) -> None:
    peer = Peer([SUCCESS] * 9)
    got = peer.run(source, "-F", command)
    assert got.code == 12
    assert "the stop command" in got.err
    assert "Traceback" not in got.err
    assert not any(f.is_end for f in d1_parse(peer.got))


@pytest.mark.parametrize("on_stderr", [False, True])
def test_a_chatty_stop_command_does_not_reach_the_stream_defect_3(
    source: Path, on_stderr: bool
) -> None:
    command = [*support.pyploop_cmd(), "-v-1", "copy", "-s", str(source), "-F",
               "echo hello; echo world >&2; echo more >/dev/stderr",
               "--sync-wait", "0", "-o", "2" if on_stderr else "1"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, env=support.pyploop_env(), timeout=30, check=False
    )
    assert done.returncode == 0
    frames = d1_parse(done.stderr if on_stderr else done.stdout)
    assert d1_replay(frames) == source.read_bytes()


def test_closed_standard_descriptors_do_not_mix_into_the_stream(source: Path) -> None:
    r, w = os.pipe()
    script = 'exec "$@" 0<&- 1>&- 2>&-'
    child = subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", *support.pyploop_cmd(), "copy", "-s", str(source),
         "-o", str(w), "-F", "echo a; echo b >&2", "--sync-wait", "0"],
        pass_fds=[w], env=support.pyploop_env(),
    )  # fmt: skip
    os.close(w)
    stream = b"".join(iter(lambda: os.read(r, 65536), b""))
    os.close(r)
    assert child.wait(20) == 0
    assert d1_replay(d1_parse(stream)) == source.read_bytes()


@pytest.mark.parametrize("where", ["tty", "null", "closed", "full"])
def test_sender_to_what_is_no_stream_ends_with_38(source: Path, where: str) -> None:
    args = ["copy", "-s", source]
    if where == "tty":
        master, slave = pty.openpty()
        got = pyploop(*args, stdout=slave)
        os.close(master)
        os.close(slave)
    elif where == "closed":
        got = pyploop(*args, prefix=["/bin/sh", "-c", 'exec "$@" 1>&-', "sh"])
    else:
        with open(f"/dev/{where}", "w") as f:
            got = pyploop(*args, stdout=f.fileno())
    assert got.code == 38
    got.one_line()


def test_sender_with_a_feedback_that_is_no_stream_ends_with_38(source: Path) -> None:
    with source.open() as f:
        got = pyploop("copy", "-s", source, "-f", f.fileno(), fds=[f.fileno()])
    assert got.code == 38
    got.one_line("-f")


def test_an_image_is_never_appended_to_a_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("head")
    with out.open("ab") as f:
        got = pyploop("copy", "-s", source, stdout=f.fileno())
    assert got.code == 38
    assert out.read_text() == "head"


def test_a_redirected_file_gets_the_image_in_place_holes_too(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as f:
        f.truncate(8 << 20)
        f.seek(3 << 20)
        f.write(b"data")
    out = tmp_path / "out"
    out.write_bytes(b"\xaa" * (9 << 20))
    with out.open("r+b") as f:
        got = pyploop("copy", "-s", sparse, stdout=f.fileno())
    assert got.code == 0, got.err
    assert out.read_bytes() == sparse.read_bytes()


def test_local_copy_is_exact_and_durable_defect_10(source: Path, tmp_path: Path) -> None:
    got = pyploop("copy", "-s", source, "-d", tmp_path / "image")
    assert (got.code, got.err) == (0, "")
    assert (tmp_path / "image").read_bytes() == source.read_bytes()
    got = pyploop("copy", "-s", source, "-d", tmp_path / "image")
    assert got.code == 1


@pytest.mark.parametrize("name", ["gone", "dir", "/dev/null"])
def test_a_source_that_is_none_ends_with_2(tmp_path: Path, name: str) -> None:
    (tmp_path / "dir").mkdir()
    got = pyploop("copy", "-s", tmp_path / name, "-d", tmp_path / "image")
    assert got.code == 2
    got.one_line("source")
    assert not (tmp_path / "image").exists()


@pytest.mark.root
def test_a_source_that_nobody_may_read_ends_with_2(tmp_path: Path) -> None:
    support.needs("root", "loop")
    who = support.as_nobody()
    import tempfile

    (tmp_path / "img").write_bytes(bytes(1 << 20))
    with (
        support.loop_device(tmp_path / "img") as loop,
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
    ):
        Path(folder).chmod(0o777)
        got = pyploop("copy", "-s", loop, "-d", f"{folder}/image", prefix=who)
        assert got.code == 2, got.err
        got.one_line("Permission denied")
        assert os.listdir(folder) == []


@pytest.mark.root
def test_a_source_mounted_in_another_namespace_ends_with_4(tmp_path: Path) -> None:
    support.needs("root", "loop", "unshare", "mkfs.ext4")
    support.run("truncate", "-s", "16M", tmp_path / "img")
    support.run("mkfs.ext4", "-q", tmp_path / "img")
    (tmp_path / "m").mkdir()
    with support.loop_device(tmp_path / "img") as loop:
        child = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c",
             f"mount {loop} {tmp_path}/m && echo ok && read x; umount {tmp_path}/m"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert child.stdout
            assert child.stdout.readline() == "ok\n"
            got = pyploop("copy", "-s", loop, "-d", tmp_path / "image")
        finally:
            child.communicate("\n", timeout=20)
    assert got.code == 4
    got.one_line("another mount namespace")
    assert not (tmp_path / "image").exists()


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["first pass", "stop command", "frozen"])
def test_sender_dies_by_its_signal_and_the_file_system_is_thawed_defects_4_and_8(
    tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    support.needs("root", "loop", "mkfs.ext4")
    support.run("truncate", "-s", "24M", tmp_path / "img")
    support.run("mkfs.ext4", "-q", tmp_path / "img")
    flag = tmp_path / "flag"
    wait = f"echo $$ > {flag}; exec sleep 60"
    with (
        support.loop_device(tmp_path / "img") as loop,
        support.mounted(loop, tmp_path / "m") as point,
    ):
        (point / "f").write_bytes(os.urandom(4 << 20))
        extra = {
            "first pass": [],
            "stop command": ["-F", wait],
            "frozen": ["--before-thaw", wait],
        }[moment]
        command = [*support.pyploop_cmd(), "-v-1", "copy", "-s", loop, *extra]
        # In the first pass it waits for a peer that reads nothing.
        r, w = os.pipe()
        if moment != "first pass":
            command += ["-d", str(tmp_path / "image")]
        child = subprocess.Popen(
            command, stdout=w, stderr=subprocess.PIPE, env=support.pyploop_env()
        )
        try:
            if moment == "first pass":
                assert os.read(r, 1)
            else:
                support.wait_until(lambda: flag.exists() and flag.read_text(), "the command")
                pid = int(flag.read_text())
            if moment == "frozen":
                assert support.is_frozen(point)
            child.send_signal(number)
            _, err = child.communicate(timeout=30)
        finally:
            child.kill()
            child.wait()
            os.close(r)
            os.close(w)
        assert child.returncode == -number, err
        assert b"Traceback" not in err
        assert not support.is_frozen(point)
        if moment != "first pass":
            assert not Path(f"/proc/{pid}").exists()
        left = sorted(p.name for p in tmp_path.iterdir() if p != flag)
        # When it was killed while frozen, the target was complete.
        complete = moment == "frozen"
        assert left == (["image", "img", "m"] if complete else ["img", "m"])
        assert (b"image is complete and was kept" in err) == complete


# ---- rows that need a ploop device

FAKED = {
    "TRACK_INIT fails": ("TRACK_INIT:EIO", 3),
    "TRACK_INIT is busy for good": ("TRACK_INIT:EBUSY", 3),
    "SETPOS fails": ("SETPOS:EIO", 3),
    "TRACK_READ fails": ("TRACK_READ:EIO", 3),
    "TRACK_STOP fails": ("TRACK_STOP:EBUSY", 3),
    "the driver's SYNC fails": ("SYNC:EIO", 3),
    "the device is missing": ("OPEN:ENOENT", 2),
    "the image is missing": ("OPEN_IMAGE:ENOENT", 4),
    "reading fails": ("READ:EIO:2", 6),
}


@pytest.fixture(scope="module")
def preload(build_cache: Path) -> Path:
    support.needs("root", "cc")  # the sender freezes
    return fakeploop.build(build_cache)


def ploop_capture(
    preload: Path,
    tmp_path: Path,
    script: str = "",
    *,
    fail: str | None = None,
    size: int = 5 << 20,
    fmt: str = "raw",
) -> tuple[fakeploop.Capture, bytes]:
    image = tmp_path / "delta"
    image.write_bytes(os.urandom(size))
    (tmp_path / "script").write_text(script)
    (tmp_path / "mnt").mkdir()
    env = fakeploop.env(
        preload, image, tmp_path, image=image, mount=tmp_path / "mnt", fmt=fmt,
        track=f"script:{tmp_path / 'script'}", fail=fail, extra=support.pyploop_env(),
    )  # fmt: skip
    for key, value in fakeploop.env(preload, image, tmp_path).items():
        if key not in env:
            env[key] = value
    got = fakeploop.capture(
        env, program=[*support.pyploop_cmd()], verbose=-1, feedback=SUCCESS * 9, stop="true"
    )
    return got, image.read_bytes()


@pytest.mark.parametrize("case", list(FAKED))
def test_sender_from_a_ploop_device_that_fails(preload: Path, tmp_path: Path, case: str) -> None:
    fail, code = FAKED[case]
    got, _ = ploop_capture(preload, tmp_path, fail=fail)
    err = got.stderr.decode()
    assert got.code == code, err
    assert len(err.splitlines()) == 1, err
    if got.stream:
        assert not any(f.is_end for f in d1_parse(got.stream))


@pytest.mark.parametrize("attribute", ["pstate/top", "pstate/block_size", "pdelta/0/image"])
def test_a_ploop_device_with_a_missing_sysfs_attribute_ends_with_9(
    tmp_path: Path, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyploop import errors
    from pyploop.disks import opening

    folder = tmp_path / "ploop0"
    texts = {"pstate/top": "0", "pstate/block_size": "2048", "pdelta/0/image": "/i",
             "pdelta/0/format": "raw"}  # fmt: skip
    for name, text in texts.items():
        if name != attribute:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    monkeypatch.setattr(opening, "_ploop_sysfs", lambda path: folder)
    (tmp_path / "dev").touch()
    with pytest.raises(errors.SysfsError) as e:
        opening._open_ploop(str(tmp_path / "dev"))
    assert e.value.exit_code == 9
    assert attribute in str(e.value)


def test_sender_from_a_ploop_device_sends_what_was_dirtied(preload: Path, tmp_path: Path) -> None:
    script = (
        f"write 1048576 4096 7\n{1 << 20} {(1 << 20) + 4096}\n--\nwrite 8192 4096 9\n8192 12288\n"
    )
    got, image = ploop_capture(preload, tmp_path, script)
    assert got.code == 0, got.stderr
    assert d1_replay(d1_parse(got.stream)) == image


def test_sender_of_an_image_with_an_unaligned_tail(preload: Path, tmp_path: Path) -> None:
    got, image = ploop_capture(preload, tmp_path, size=(1 << 20) + 516)
    assert got.code == 0, got.stderr
    assert d1_replay(d1_parse(got.stream)) == image


def test_ploop1_header_is_sent_as_not_in_use(preload: Path, tmp_path: Path) -> None:
    got, image = ploop_capture(preload, tmp_path, fmt="ploop1")
    assert got.code == 0, got.stderr
    assert d1_replay(d1_parse(got.stream)) == image[:44] + bytes(4) + image[48:]


def test_a_frozen_ploop_device_that_never_becomes_clean_ends_with_14(
    preload: Path, tmp_path: Path
) -> None:
    passes = "".join(f"write 8192 4096 {n}\n8192 12288\n--\n" for n in range(1, 60))
    got, _ = ploop_capture(preload, tmp_path, passes)
    assert got.code == 14, got.stderr
    assert not any(f.is_end for f in d1_parse(got.stream))


# ---- output


def test_stdout_that_cannot_be_written_does_not_spoil_a_good_copy(
    source: Path, tmp_path: Path
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*support.pyploop_cmd(), "copy", "-s", str(source), "-d", str(tmp_path / "image")],
            stdout=full, stderr=subprocess.PIPE, env=support.pyploop_env(), timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"Exception" not in done.stderr


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_an_answer_that_cannot_be_written_is_an_error_in_one_line(option: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*support.pyploop_cmd(), option],
            stdout=full, stderr=subprocess.PIPE, env=support.pyploop_env(), timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode == 7
    assert done.stderr == b"pyploop: cannot write to stdout: No space left on device\n"


def test_a_source_name_that_is_not_utf8_is_copied(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/na\xffme"
    Path(os.fsdecode(name)).write_bytes(DATA)
    done = subprocess.run(
        [*support.pyploop_cmd(), "copy", "-s", name, "-d", str(tmp_path / "image")],
        capture_output=True, timeout=30, check=False,
        env={**support.pyploop_env(), "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "image").read_bytes() == DATA


def test_feedback_may_have_a_descriptor_past_1023(source: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1100:
        support.missing("needs a limit of 1100 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1100), hard))
    peer = Peer([SUCCESS] * 9)
    os.dup2(peer.fb_r, 1050)
    os.close(peer.fb_r)
    peer.fb_r = 1050
    try:
        got = peer.run(source)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert got.code == 0, got.err


def test_sync_wait_is_honest_without_a_way_back(source: Path) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [*support.pyploop_cmd(), "copy", "-s", str(source), "-F", "true", "--sync-wait", "0.1"],
        capture_output=True, env=support.pyploop_env(), timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert time.monotonic() - start >= 0.1
    assert b"nothing is acknowledged" in done.stderr
