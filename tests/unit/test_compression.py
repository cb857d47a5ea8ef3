# SPDX-License-Identifier: Apache-2.0
"""--compress: what arrives, what both ends say of it, and peers that cannot take it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import support
from support import MIB, SUCCESS, d1_end, d1_frame, d1_sync, run

from pyploop.api.copying import Copy, CopyOptions
from pyploop.diskcopy.compression import AUTO, NEVER, parse_compression
from pyploop.diskcopy.receiver import receive
from pyploop.errors import ParameterError, ProtocolError
from pyploop.report.events import Reporter

NOISE = random.Random(14).randbytes(MIB)
TEXT = b"".join(b"%d lines of text\n" % (n * n) for n in range(60_000))[:MIB]

VERSION_3 = (
    "import sys; from pyploop.diskcopy import replies; replies.d1.FEATURES = b'none';"
    "from pyploop.cli.main import main; sys.exit(main())"
)
"""A receiver that takes the offer for a SYNC, as one of version 3 does."""


def events(path: Path, name: str) -> dict[str, Any]:
    records = map(json.loads, path.read_text().splitlines())
    (found,) = (r for r in records if r["event"] == name)
    return dict(found)


class Ends:
    """A sender and a receiver in processes of their own, and what they said."""

    def __init__(self, folder: Path, data: bytes) -> None:
        self.source, self.target = folder / "source", folder / "target"
        self._sent, self._received = folder / "sent", folder / "received"
        self.source.write_bytes(data)
        self.log = ""

    def copy(self, *options: str, pipe: bool = False, old: bool = False) -> None:
        with contextlib.ExitStack() as fds:
            if pipe:
                in_r, in_w = os.pipe()
                back_r, back_w = os.pipe()
                to, back, feedback = in_w, back_r, ["-f", str(back_w)]
                theirs = [in_r, back_w]
                sending = ["-o", str(to), "-f", str(back)]
            else:
                one, other = (s.detach() for s in socket.socketpair())
                to, in_r, feedback, theirs, sending = one, other, [], [other], ["-o", str(one)]
            ours = [to, back_r] if pipe else [to]
            for fd in {*theirs, *ours}:
                fds.callback(os.close, fd)
            program = [sys.executable, "-c", VERSION_3] if old else support.pyploop_cmd()
            command = [*program, "copy", "-d", str(self.target), "-i", str(in_r), *feedback]
            receiver = subprocess.Popen(
                [*command, "--json", str(self._received)],
                pass_fds=theirs,
                env=support.pyploop_env(),
            )
            try:
                self.log = run(
                    *support.pyploop_cmd(), "-v4", "copy", "-s", self.source, *sending,
                    "--json", self._sent, *options, pass_fds=ours, env=support.pyploop_env(),
                )  # fmt: skip
                assert receiver.wait(20) == 0
            finally:
                receiver.kill()
                receiver.wait()
        assert self.target.read_bytes() == self.source.read_bytes()

    @property
    def sent(self) -> dict[str, Any]:
        return events(self._sent, "summary")

    @property
    def received(self) -> dict[str, Any]:
        return events(self._received, "received")


@pytest.mark.parametrize("pipe", [True, False])
@pytest.mark.invariant(number=8)
def test_what_is_compressed_arrives_and_is_counted_at_both_ends(tmp_path: Path, pipe: bool) -> None:
    ends = Ends(tmp_path, TEXT + NOISE + TEXT)
    ends.copy("--compress", "zstd:3", pipe=pipe)
    sent, received = ends.sent, ends.received
    assert sent["compression"] == "zstd:3"
    assert sent["data_bytes"] == received["data_bytes"] == 3 * MIB
    # Noise is a part of no compressed frame but one that has text in it, too.
    assert 2 * MIB <= sent["compressed_bytes"] <= 2 * MIB + MIB // 2
    for name in ("compressed_bytes", "compressed_frames", "frames"):
        assert sent[name] == received[name]
    assert MIB < sent["wire_bytes"] < 2 * MIB
    assert sent["wire_bytes"] + 16 >= received["stream_bytes"] > MIB
    assert "Compression: zstd:3\n" in ends.log
    assert f" ({sent['compressed_frames']} of {sent['frames']} frames); " in ends.log


def test_noise_takes_no_more_than_without(tmp_path: Path) -> None:
    ends = Ends(tmp_path, NOISE)
    ends.copy("--compress", "zstd")
    compressed = ends.sent
    ends.target.unlink()
    ends.copy()
    plain = ends.sent
    assert (compressed["compression"], plain["compression"]) == ("zstd:3", "never")
    assert compressed["compressed_frames"] == 0
    # One more SYNC: the offer.
    assert compressed["wire_bytes"] == plain["wire_bytes"] + 20


def test_a_slow_line_makes_auto_compress(tmp_path: Path) -> None:
    ends = Ends(tmp_path, TEXT * 8)
    ends.copy("--compress", "auto", "--bwlimit", "8M")
    assert ends.sent["compressed_bytes"] > 0
    assert ends.sent["wire_bytes"] < ends.sent["data_bytes"]


@pytest.mark.parametrize("compress", ["auto", "zstd"])
def test_a_receiver_of_version_3_gets_plain_frames(tmp_path: Path, compress: str) -> None:
    ends = Ends(tmp_path, TEXT)
    ends.copy("--compress", compress, old=True)
    assert ends.sent["compression"] == "never"
    assert ends.received["compressed_frames"] == 0
    assert ends.sent["acknowledged"] == "acknowledged"
    assert "Compression: never (the target does not take compressed frames)\n" in ends.log


def test_a_local_copy_is_not_compressed(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(TEXT)
    with Copy(source, target, options=CopyOptions(compress="zstd")) as copying:
        copying.run()
        assert copying.result.compression == "never"
    assert target.read_bytes() == TEXT


# ---- the option


def test_what_the_option_means() -> None:
    assert parse_compression("never") is NEVER and not NEVER
    assert parse_compression("auto") is AUTO and AUTO
    assert parse_compression("zstd") == parse_compression("zstd:3")
    assert parse_compression("zstd:19").level == 19


@pytest.mark.parametrize(
    "text", ["", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "zstd:²", "auto:1", "lz4", "ZSTD"]
)
def test_other_words_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ParameterError, match="compress: "):
        Copy(tmp_path / "source", tmp_path / "target", options=CopyOptions(compress=text))
    command = [*support.pyploop_cmd(), "copy", "-s", "/dev/null", f"--compress={text}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 38
    assert "--compress" in done.stderr


# ---- the receiver


def frame(data: bytes, *, size: int | None = None) -> bytes:
    """A compressed frame at 0 of up to 255 equal bytes: one RLE block (RFC 8878)."""
    count = len(data)
    block = (1 | 1 << 1 | count << 3).to_bytes(3, "little") + data[:1]
    zstd = bytes.fromhex("28b52ffd20") + bytes([count]) + block
    raw = count if size is None else size
    head = struct.pack("<IIQ", 0x4CC0AC50, 8 + len(zstd), 0)
    return head + struct.pack("<IB3x", raw, 1) + zstd


GREETING = d1_sync(b"PYP\x01") + d1_sync(b"PYP\x02") + d1_frame(1, b"PYP\x05")


def received(target: Path, stream: bytes) -> bytes:
    """The answers to HELLO 1, 2 and 5, and this."""
    (in_r, in_w), (back_r, back_w) = os.pipe(), os.pipe()
    try:
        os.write(in_w, GREETING + stream)
        os.close(in_w)
        receive(str(target), in_r, back_w, Reporter(), 20)
        return os.read(back_r, 4096)
    finally:
        for fd in (in_r, back_r, back_w):
            os.close(fd)


def test_an_agreed_compressed_frame_is_written(tmp_path: Path) -> None:
    data = b"a" * 200
    answers = received(tmp_path / "image", frame(data) + d1_end())
    assert answers[72:80] == b"PYPLOOP\x05"
    assert answers[136:152] == struct.pack("<QQ", 1, 0)
    assert answers[152:160] == SUCCESS
    assert (tmp_path / "image").read_bytes() == data


@pytest.mark.parametrize("size", [199, 201, 1 << 20])
def test_a_frame_that_gives_another_length_ends_with_13(tmp_path: Path, size: int) -> None:
    with pytest.raises(ProtocolError) as error:
        received(tmp_path / "image", frame(b"a" * 200, size=size) + d1_end())
    assert f"a compressed frame does not give the {size} bytes that it announces, at frame 0" in (
        str(error.value)
    )
    assert list(tmp_path.iterdir()) == []
