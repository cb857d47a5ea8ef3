# SPDX-License-Identifier: Apache-2.0
"""Run the C tool (or our own) against a made-up ``/dev/ploopN``; see README.md."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TRACKER_NEEDS = ("bitmap.c", "btf.c", "bpf_tracker.c")  # and the other bpf_*.c
DEVICE = "/dev/ploop0"

MARKER = 0x4CC0AC3D
HEADER = struct.Struct("<IIQ")
SYNC_SIZE = 4

Frame = tuple[int, int, bytes]


def build(tmp_dir: Path) -> Path:
    """Compile the preload library into tmp_dir, once per content; with the
    BPF tracker of the main tree when its sources are there."""
    sources = [HERE / "fakeploop.c"]
    flags = ["-O2", "-g", "-fPIC", "-shared", "-std=gnu11", "-Wall", "-Wextra"]
    flags += ["-U_FORTIFY_SOURCE", "-fvisibility=hidden"]
    headers: list[Path] = []
    tracker = {CSRC / name for name in TRACKER_NEEDS}
    if all(path.exists() for path in tracker):
        sources += sorted(tracker.union(CSRC.glob("bpf_*.c")))
        headers = sorted(CSRC.glob("*.h"))
        flags += ["-DFAKEPLOOP_BPF", f"-I{CSRC}"]
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    target = tmp_dir / f"fakeploop-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CC", "cc"), *flags, "-o", str(partial)]
        subprocess.run([*command, *map(str, sources)], check=True)
        partial.rename(target)
    return target


def env(
    library: Path,
    backing: Path | str,
    work_dir: Path,
    *,
    device: str = DEVICE,
    image: Path | str | None = None,
    fmt: str = "raw",
    block: int = 2048,
    mount: Path | str | None = None,
    track: str | None = None,
    fail: str | None = None,
    log_io: bool = False,
    sleep: bool = True,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment for a process that is to see the fake device.

    work_dir receives ``log`` (see read_log) and the faked sysfs files.
    """
    settings = {
        "LD_PRELOAD": str(library),
        "FAKEPLOOP_DEV": device,
        "FAKEPLOOP_BACKING": str(backing),
        "FAKEPLOOP_FORMAT": fmt,
        "FAKEPLOOP_BLOCK": str(block),
        "FAKEPLOOP_DIR": str(work_dir / "fake"),
        "FAKEPLOOP_LOG": str(work_dir / "log"),
    }
    optional = {
        "FAKEPLOOP_IMAGE": image,
        "FAKEPLOOP_MOUNT": mount,
        "FAKEPLOOP_TRACK": track,
        "FAKEPLOOP_FAIL": fail,
        "FAKEPLOOP_LOG_IO": "1" if log_io else None,
        "FAKEPLOOP_NOSLEEP": None if sleep else "1",
    }
    settings.update({key: str(value) for key, value in optional.items() if value})
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FAKEPLOOP_")}
    return {**inherited, **settings, **(extra or {})}


def c_sender_cmd(
    *,
    stop: str | None = None,
    ofd: int | None = None,
    ffd: int | None = None,
    target: Path | str | None = None,
    device: str = DEVICE,
    verbose: int | None = None,
    program: Sequence[str] = ("ploop",),
) -> list[str]:
    """The command line that sends (or, with target, copies locally)."""
    command = [*program]
    if verbose is not None:
        command.append(f"-v{verbose}")
    command += ["copy", "-s", device]
    return command + _options(F=stop, o=ofd, f=ffd, d=target)


def c_receiver_cmd(
    target: Path | str,
    *,
    ifd: int | None = None,
    ffd: int | None = None,
    program: Sequence[str] = ("ploop",),
) -> list[str]:
    """The command line that receives."""
    return [*program, "copy", "-d", str(target), *_options(i=ifd, f=ffd)]


def _options(**values: object) -> list[str]:
    words = ((f"-{key}", str(value)) for key, value in values.items() if value is not None)
    return [word for pair in words for word in pair]


def parse_d1(stream: bytes) -> list[Frame]:
    """All frames (size, pos, data) of a complete stream, END included."""
    frames: list[Frame] = []
    at = 0
    while True:
        if len(stream) - at < HEADER.size:
            raise ValueError(f"no END: {len(stream) - at} bytes left at {at}")
        marker, size, pos = HEADER.unpack_from(stream, at)
        if marker != MARKER:
            raise ValueError(f"bad marker {marker:#x} at {at}")
        at += HEADER.size
        data = stream[at : at + size]
        if len(data) != size:
            raise ValueError(f"frame at {at} has {len(data)} of {size} bytes")
        frames.append((size, pos, data))
        at += size
        if size == 0:
            break
    if at != len(stream):
        raise ValueError(f"{len(stream) - at} bytes after END")
    return frames


def replay(frames: Sequence[Frame]) -> bytes:
    """The image that a receiver makes of the frames."""
    image = bytearray()
    for size, pos, data in frames:
        if size in (0, SYNC_SIZE):
            continue
        image.extend(bytes(max(0, pos + size - len(image))))
        image[pos : pos + size] = data
    return bytes(image)


@dataclass(frozen=True)
class LogLine:
    """One intercepted operation; seconds are those of time.monotonic()."""

    seconds: float
    op: str
    rest: str


def read_log(path: Path) -> list[LogLine]:
    """The lines of a FAKEPLOOP_LOG file."""
    lines = []
    for line in path.read_text().splitlines():
        seconds, op, rest = (*line.split(" ", 2), "")[:3]
        lines.append(LogLine(float(seconds), op, rest))
    return lines


@dataclass(frozen=True)
class Capture:
    """What one sender wrote, and how it ended."""

    code: int
    stream: bytes
    stdout: bytes
    stderr: bytes


def capture(
    environ: Mapping[str, str],
    *,
    stop: str | None = "true",
    feedback: bytes | None = b"SUCCESS\n",
    verbose: int | None = None,
    device: str = DEVICE,
    program: Sequence[str] = ("ploop",),
    more: Sequence[str] = (),
    one_socket: bool = False,
    timeout: float = 60,
) -> Capture:
    """Run a sender with its stream on a descriptor of its own and record it.

    feedback is what the peer answers (written beforehand, then the pipe is
    closed); None runs the sender without feedback.  more: further options.
    one_socket: the stream, and the feedback, on a socket instead of pipes.
    """
    with contextlib.ExitStack() as stack:
        if one_socket:
            ends = (stack.enter_context(s) for s in socket.socketpair())
            stream_r, stream_w = (io.FileIO(s.detach(), "r+") for s in ends)
            stack.callback(stream_r.close)
            stack.callback(stream_w.close)
            stream_r.write(feedback or b"")
            fb_r = stream_w
        else:
            stream_r, stream_w = _pipe(stack)
            fb_r, fb_w = _pipe(stack)
            fb_w.write(feedback or b"")
            fb_w.close()
        cat = subprocess.Popen(["cat"], stdin=stream_r, stdout=subprocess.PIPE)
        stack.callback(_reap, cat)
        stream_r.close()
        command = c_sender_cmd(
            stop=stop,
            ofd=stream_w.fileno(),
            ffd=None if feedback is None else fb_r.fileno(),
            verbose=verbose,
            device=device,
            program=program,
        )
        sender = subprocess.Popen(
            [*command, *more],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(stream_w.fileno(), fb_r.fileno()),
        )
        stack.callback(_reap, sender)
        stream_w.close()
        fb_r.close()
        stream, _ = cat.communicate(timeout=timeout)
        stdout, stderr = sender.communicate(timeout=timeout)
        return Capture(sender.returncode, stream, stdout, stderr)


def _pipe(stack: contextlib.ExitStack) -> tuple[io.FileIO, io.FileIO]:
    reader, writer = os.pipe()
    ends = io.FileIO(reader, "r"), io.FileIO(writer, "w")
    for end in ends:
        stack.callback(end.close)
    return ends


def _reap(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


@contextlib.contextmanager
def loop_device(image: Path, *, offset: int = 0) -> Iterator[str]:
    """A loop device on image (root only)."""
    command = ["losetup", "--find", "--show", "--offset", str(offset), str(image)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    name = done.stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)


@contextlib.contextmanager
def mounted(device: str, folder: Path, options: str = "rw") -> Iterator[Path]:
    """device mounted on folder (root only)."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", options, device, str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
