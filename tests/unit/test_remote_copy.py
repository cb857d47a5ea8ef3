# SPDX-License-Identifier: Apache-2.0
"""Copies from and to another host, without ssh: a script that has its name runs the command
on this host.  And the protocol, against an end that does not keep to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakehost import fake_host
from support import needs, pyploop_cmd, pyploop_env, wait_until

import pyploop
from pyploop._core import Proof
from pyploop.api import copy_client
from pyploop.api.remote_verifying import There
from pyploop.copyagent import agent as agent_module
from pyploop.copyagent.agent import CopyAgent
from pyploop.copyagent.permits import Permits
from pyploop.errors import (
    ConnectError,
    CreateError,
    DeviceError,
    ParameterError,
    ProtocolError,
    ReadError,
)
from pyploop.report import checked, event_types
from pyploop.transport import deadlines
from pyploop.transport import lane_handover as lanes
from pyploop.transport.mux import Mux
from pyploop.transport.place import Place, is_host, place
from pyploop.units import MIB
from pyploop.wire import copy_messages
from pyploop.wire import mux as wire

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is the user's home on the other host."""
    return fake_host(tmp_path, monkeypatch)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = tmp_path / "image"
    made.write_bytes(os.urandom(3 * MIB + 512) + bytes(MIB))
    return made


# ---- names of places


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/dev/vdb", ("", "/dev/vdb")),
        ("vdb.img", ("", "vdb.img")),
        ("./a:b", ("", "./a:b")),
        ("/srv/a:b", ("", "/srv/a:b")),
        ("db1:/dev/vdb", ("db1", "/dev/vdb")),
        ("db1:vdb.img", ("db1", "vdb.img")),
        ("root@db1:/dev/vdb", ("root@db1", "/dev/vdb")),
        ("[fe80::1%eth0]:/dev/vdb", ("fe80::1%eth0", "/dev/vdb")),
        ("root@[::1]:/srv/a:b", ("root@::1", "/srv/a:b")),
        (":x", ("", ":x")),
        ("a b:c\nd", ("a b", "c\nd")),
    ],
)
def test_a_colon_before_the_first_slash_makes_a_place_on_another_host(
    text: str, found: tuple[str, str]
) -> None:
    assert place(text) == Place(*found)


def test_a_host_without_a_path_and_two_other_hosts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="names no path on that host"):
        pyploop.copy("db1:", tmp_path / "x")
    with pytest.raises(ParameterError, match="both not on this host"):
        pyploop.copy("db1:/dev/vdb", "db2:/srv/vdb")


@pytest.mark.parametrize(
    "host",
    ["-oProxyCommand=evil", "u@-h", "-u@h", "@h", "u;x@h", "$(x)", "a b", "a\nb", " ", "h\\"],
)
def test_a_name_that_ssh_would_take_for_more_than_a_name_is_refused(image: Path, host: str) -> None:
    with pytest.raises(ParameterError, match="is not a host name"):
        pyploop.copy(str(image), f"{host}:/x")


def test_names_of_hosts_and_users_of_any_kind_are_taken() -> None:
    for host in ("db1", "root@db-1.example.com", "fe80::1%eth0", "u@realm@h", "DOM\\u@h", "h_1"):
        assert is_host(host)


def test_a_path_or_a_command_that_is_no_text_is_refused_before_anything_starts(
    host: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The script is no ssh whose end is the lane's end: the agent has its descriptors.
    monkeypatch.setattr(deadlines, "ENDING", 0.2)
    (host / "disk").write_bytes(b"x" * MIB)
    options = pyploop.CopyOptions(before_thaw="echo \udcff")
    for source, target, made in (
        (str(image), "b:\udcff", None),
        ("b:\udcff", str(tmp_path / "got"), None),
        ("b:disk", str(tmp_path / "got"), options),
    ):
        with pytest.raises(ParameterError, match="can only be sent texts in UTF-8"):
            pyploop.copy(source, target, options=made)
    assert not (tmp_path / "got").exists()


def test_a_tilde_is_the_home_of_the_user_there(host: Path, image: Path, tmp_path: Path) -> None:
    pyploop.copy(str(image), "b:~/pushed")
    pyploop.copy("b:~/pushed", str(tmp_path / "back"))
    assert (host / "pushed").read_bytes() == image.read_bytes() == (tmp_path / "back").read_bytes()


def test_a_login_shell_that_prints_without_an_end_of_line_is_no_obstacle(
    host: Path, image: Path
) -> None:
    program = script(host, f"printf 'hello '; exec {' '.join(pyploop_cmd())} \"$@\"")
    pyploop.copy(str(image), "b:there", options=pyploop.CopyOptions(remote_pyploop=program))
    assert (host / "there").read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["a"], "name both SOURCE and TARGET"),
        (["a", "b", "c"], "name both SOURCE and TARGET"),
        (["a", "b", "-d", "c"], "name both SOURCE and TARGET"),
        (["a", "b", "-f", "0"], "-f is for a pipe"),
        (["a", "b:c", "-o", "3"], "-o and -i are for a stream"),
        (["a", "b:c", "-i", "3"], "-o and -i are for a stream"),
        (["a", "b", "--ssh", "-v"], "are for a SOURCE or TARGET on another host"),
        (["-s", "a", "-d", "b:c", "--remote-pyploop", "x"], "are for a SOURCE or TARGET on"),
        (["-d", "b", "--receipt", "x"], "are for the side that reads the source"),
        (["-d", "b", "--proof", "always"], "are for the side that reads the source"),
        (["db1:/dev/vdb", "b", "--trace", "x"], "run this on db1"),
        (["a", "b:c", "--ssh", "'"], "--ssh: No closing quotation"),
        (["a", "b:c", "--compat", "ploop"], "protocol 'ploop' is for a receiver"),
        (["a", "b:c", "--remote-pyploop", "'"], "is not a command"),
    ],
)
def test_words_that_do_not_go_together_are_wrong_options(words: list[str], why: str) -> None:
    command = [*pyploop_cmd(), "copy", *words]
    done = subprocess.run(command, env=pyploop_env(), capture_output=True, text=True, check=False)
    assert (done.returncode, why in done.stderr) == (38, True), done.stderr


def test_the_steps_of_a_copy_are_for_this_host_and_say_so(image: Path, tmp_path: Path) -> None:
    for source, target in (("db1:/dev/vdb", str(tmp_path / "x")), (str(image), "db1:x")):
        with pytest.raises(ParameterError, match=r"is on another host \(db1\), and the steps"):
            pyploop.Copy(source, target)
    with pyploop.Copy(image, tmp_path / "a:b") as copying:
        copying.run()
    assert (tmp_path / "a:b").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("option", ["--json", "--trace"])
@pytest.mark.parametrize("log", ["image", "link", "got"])
def test_a_log_never_replaces_the_source_or_the_target(
    image: Path, tmp_path: Path, option: str, log: str
) -> None:
    data = image.read_bytes()
    (tmp_path / "link").symlink_to("image")
    command = [*pyploop_cmd(), "copy", "image", "got", option, log]
    done = subprocess.run(
        command, env=pyploop_env(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, f"{option}: {log} is the" in done.stderr) == (38, True)
    assert image.read_bytes() == data
    assert not (tmp_path / "got").exists()


def test_options_of_old_name_files_with_colons_on_this_host(image: Path, tmp_path: Path) -> None:
    command = [*pyploop_cmd(), "copy", "-s", str(image), "-d", "a:b"]
    subprocess.run(command, env=pyploop_env(), cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "a:b").read_bytes() == image.read_bytes()


def test_source_and_target_may_stand_anywhere_among_the_options(
    image: Path, tmp_path: Path
) -> None:
    command = [*pyploop_cmd(), "copy", str(image), "--bwlimit", "1G", str(tmp_path / "got"), "-t"]
    subprocess.run(command, env=pyploop_env(), capture_output=True, check=True)
    assert (tmp_path / "got").read_bytes() == image.read_bytes()


# ---- the copy


def test_a_push_and_a_pull_bring_every_byte_and_name_the_other_host(
    host: Path, image: Path, tmp_path: Path
) -> None:
    seen: list[Any] = []
    done = pyploop.copy(str(image), "backup1:there", on_event=seen.append)
    assert (host / "there").read_bytes() == image.read_bytes()
    assert (done.source_host, done.target_host, done.acknowledged) == (
        *("", "backup1"),
        "acknowledged",
    )
    assert {e.host for e in seen if isinstance(e, event_types.Received)} == {"backup1"}
    assert done.compression == "auto"

    seen.clear()
    back = tmp_path / "back"
    options = pyploop.CopyOptions(compress="zstd:5")
    done = pyploop.copy("db1:there", str(back), options=options, on_event=seen.append)
    assert done.compression == "zstd:5"
    assert back.read_bytes() == image.read_bytes()
    assert (done.source_host, done.target_host) == ("db1", "")
    assert done.size == image.stat().st_size
    assert {e.host for e in seen if isinstance(e, event_types.Summary)} == {"db1"}


def test_a_push_and_a_pull_are_proven_and_have_a_receipt_here(
    host: Path, image: Path, tmp_path: Path
) -> None:
    receipt, back = tmp_path / "receipt", tmp_path / "back"
    options = pyploop.CopyOptions(receipt=receipt)
    here = os.uname().nodename
    for source, target, found, ends in (
        (str(image), "b:there", host / "there", (here, str(image), "b", "there")),
        ("b:there", str(back), back, ("b", "there", here, str(back))),
    ):
        done = pyploop.copy(source, target, options=options)
        assert done.proven
        result = pyploop.verify(found, receipt)
        assert (result.same, result.root, result.proven) == (True, done.root, True)
        paper = json.loads(receipt.read_text())
        names = ("source_host", "source", "target_host", "target")
        assert tuple(paper[name] for name in names) == ends
        receipt.unlink()
    done = pyploop.copy(str(image), "b:other", options=pyploop.CopyOptions(proof="never"))
    assert (done.proven, done.root) == (False, None)


def test_a_failure_there_has_the_class_and_the_code_that_it_had_there(
    host: Path, image: Path, tmp_path: Path
) -> None:
    (host / "taken").touch()
    with pytest.raises(CreateError, match="backup1: cannot create taken: File exists"):
        pyploop.copy(str(image), "backup1:taken")
    with pytest.raises(DeviceError, match="db1: cannot open the source nothing"):
        pyploop.copy("db1:nothing", str(tmp_path / "got"))
    with pytest.raises(DeviceError, match=r"^cannot open the source"):
        pyploop.copy(str(tmp_path / "nothing"), "backup1:got")
    assert not (tmp_path / "got").exists() and not (host / "got").exists()


def test_the_commands_of_a_pull_run_on_the_source_s_host_and_are_undone_there(
    host: Path, image: Path, tmp_path: Path
) -> None:
    (host / "disk").write_bytes(image.read_bytes())
    stop = pyploop.Stop("cmd", "pwd > stopped", undo="pwd > undone")
    options = pyploop.CopyOptions(stops=[stop], before_thaw="false")
    with pytest.raises(pyploop.CommandError, match="db1: "):
        pyploop.copy("db1:disk", str(tmp_path / "got"), options=options)
    assert (host / "stopped").read_text() == f"{host}\n"
    assert (host / "undone").read_text() == f"{host}\n"


def test_a_copy_that_fails_there_after_its_end_keeps_the_target_and_says_so(
    host: Path, image: Path, tmp_path: Path
) -> None:
    (host / "disk").write_bytes(image.read_bytes())
    options = pyploop.CopyOptions(before_thaw="false")
    with pytest.raises(pyploop.CommandError, match="got is complete and was kept"):
        pyploop.copy("db1:disk", str(tmp_path / "got"), options=options)
    assert (tmp_path / "got").read_bytes() == image.read_bytes()


# ---- comparing


@pytest.mark.parametrize("name", ["receipt", "image"])
def test_an_image_there_is_compared_with_what_is_here_and_the_other_way_round(
    host: Path, image: Path, tmp_path: Path, name: str
) -> None:
    receipt = tmp_path / "receipt"
    pyploop.copy(str(image), "b:disk", options=pyploop.CopyOptions(receipt=receipt))
    (host / "receipt").write_bytes(receipt.read_bytes())
    (host / "image").write_bytes(image.read_bytes())
    for pair in (("b:disk", str(tmp_path / name)), (str(image), f"b:{name}")):
        found = pyploop.verify(*pair)
        assert (found.same, found.why, found.differing) == (True, "", ())
        assert found == pyploop.verify(image, tmp_path / name)
    for at in (MIB + 7, 4 * MIB + 511):
        with open(host / "disk", "r+b") as f:
            f.seek(at)
            f.write(b"X")
    found = pyploop.verify("b:disk", str(tmp_path / name))
    here = pyploop.verify(host / "disk", tmp_path / name)
    assert not found.same
    assert (found.differing, found.root) == (here.differing, here.root)
    assert len(found.differing) == 2


def test_two_images_of_other_sizes_or_with_nothing_in_common_are_different(
    host: Path, image: Path
) -> None:
    size = image.stat().st_size
    (host / "disk").write_bytes(bytes(b ^ 1 for b in image.read_bytes()))
    found = pyploop.verify(str(image), "b:disk")
    assert (found.same, found.differing) == (False, ((0, size),))
    (host / "disk").write_bytes(b"x")
    assert "has 1" in pyploop.verify(str(image), "b:disk").why
    (host / "disk").write_bytes(b"")
    assert pyploop.verify("b:disk", host / "disk").same


def test_what_cannot_be_compared_is_an_error_and_not_a_difference(
    host: Path, image: Path, tmp_path: Path
) -> None:
    (host / "receipt").write_text('{"schema": "pyploop.receipt/1"}')
    with pytest.raises(DeviceError, match="b: cannot open the source none"):
        pyploop.verify(str(image), "b:none")
    with pytest.raises(pyploop.FormatError, match="b:receipt is a receipt that is damaged"):
        pyploop.verify(str(image), "b:receipt")
    with pytest.raises(ParameterError, match="both not on this host"):
        pyploop.verify("b:x", "c:y")
    with pytest.raises(ParameterError, match="names no path"):
        pyploop.verify("b:", str(image))
    with pytest.raises(ConnectError, match=r"no pyploop on b .*; nothing was compared"):
        pyploop.verify(str(image), "b:x", remote_pyploop="/none")


def test_a_name_with_a_colon_can_be_compared_here(image: Path, tmp_path: Path) -> None:
    (tmp_path / "a:b").write_bytes(image.read_bytes())
    assert pyploop.verify(tmp_path / "a:b", str(image)).same
    assert pyploop.verify(f"{tmp_path}/a:b", str(image)).same


@pytest.mark.parametrize(
    ("root", "hashes", "why"),
    [
        ("no", b"", "a wrong root"),
        (["00" * 16], b"", "a wrong root"),
        ("00" * 16, bytes(7), "7 bytes of hashes"),
        ("00" * 16, None, "not those of its root"),
    ],
)
def test_answers_about_an_image_there_that_make_no_sense_are_refused(
    root: Any, hashes: bytes | None, why: str
) -> None:
    own = Proof(MIB)
    own.note(0, b"x" * MIB)
    own.root()

    def ask(op: str, **args: Any) -> dict[str, Any]:
        there = own.leaves(0, 256) if hashes is None else hashes
        return {"done": True, "result": {"root": root}, "hashes": there}

    image = There(ask, "b", {"size": MIB, "device": False})
    image.start(MIB)
    with pytest.raises(ProtocolError, match=why):
        image.root()
        image.differences(own)


# ---- no agent there


def fails(image: Path, program: str, **options: Any) -> ConnectError:
    made = pyploop.CopyOptions(remote_pyploop=program, **options)
    with pytest.raises(ConnectError) as e:
        pyploop.copy(str(image), "b:there", options=made)
    assert e.value.exit_code == 69
    return e.value


def script(folder: Path, text: str) -> str:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("exit 127", "there is no pyploop on b", "install pyploop"),
        (
            "echo \"pyploop: unknown command 'copy-agent'\" >&2; exit 38",
            "the pyploop on b is too old for remote copies",
            "install pyploop",
        ),
        ("echo PYPLOOP-AGENT 2 9.0; cat", "it speaks agent protocol 2", "the same version"),
        ("echo PYPLOOP-AGENT 1 9.0; cat", "it is pyploop 9.0", "the same version"),
        ("echo 'Permission denied' >&2; exit 255", "cannot connect to b: Permission", "BatchMode"),
        (f"exec {' '.join(pyploop_cmd())} agent", "is no pyploop copy-agent", "must be"),
    ],
)
def test_a_host_without_an_agent_that_fits_is_named_before_anything_starts(
    host: Path, image: Path, text: str, message: str, hint: str
) -> None:
    failure = fails(image, script(image.parent, text))
    assert message in str(failure)
    assert "nothing was copied" in str(failure) or "another major version" in str(failure)
    assert hint in (failure.hint or "")
    assert not (host / "there").exists()


def test_an_option_that_the_other_host_does_not_know_is_named_before_anything_starts(
    host: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = dict(copy_messages.TARGET_OPTIONS)
    old = (
        "from pyploop.wire import copy_messages; copy_messages.TARGET_OPTIONS.clear(); "
        "from pyploop.cli.main import main; main()"
    )
    program = script(tmp_path, f"exec {sys.executable} -c '{old}' \"$@\"")
    assert known
    failure = fails(image, program, timeout=5.0)
    assert "does not know the option 'timeout'" in str(failure)


def test_a_lane_that_does_not_come_about_ends_the_copy(
    host: Path, image: Path, tmp_path: Path
) -> None:
    ours = " ".join(pyploop_cmd())
    program = script(tmp_path, f'[ "$1" = copy-lane ] && exit 3; exec {ours} "$@"')
    failure = fails(image, program)
    assert "the connection to b for the data does not come about" in str(failure)
    assert not (host / "there").exists()


@pytest.mark.parametrize("aes", [True, False])
def test_a_first_lane_that_connects_too_early_is_made_again(
    host: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aes: bool
) -> None:
    """Its connection ends before its token comes; or it may have the wrong cipher."""
    begun = tmp_path / "begun"
    found = json.dumps(["aes"] if aes else [])
    patch = f"from pyploop.system import cpu; cpu.flags = lambda: {found}"
    monkeypatch.setattr("pyploop.system.cpu.flags", lambda: ["aes"])
    program = script(
        tmp_path,
        f'[ "$1" != copy-lane ] || [ -e {begun} ] || {{ touch {begun}; exit 3; }}\n'
        f"exec {sys.executable} -c '{patch}; from pyploop.cli.main import main; main()' \"$@\"",
    )
    options = pyploop.CopyOptions(remote_pyploop=program)
    pyploop.copy(str(image), "b:there", options=options)
    assert begun.exists()
    assert (host / "there").read_bytes() == image.read_bytes()


# ---- lanes and tokens


@contextlib.contextmanager
def awaited() -> Iterator[tuple[lanes.Awaited, list[Any], threading.Thread]]:
    """A lane that an agent waits for, and what it gets."""
    lane = lanes.Awaited()
    got: list[Any] = []

    def take() -> None:
        try:
            got.append(lane.take())
        except ReadError as e:
            got.append(e)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        yield lane, got, thread
    finally:
        lane.close()
        thread.join(10)
        for one in got:
            if isinstance(one, lanes.Lane):
                one.close()


def come(token: str, *descriptors: int, name: str | None = None) -> socket.socket:
    """Connect as a lane would, and hand over these descriptors."""
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect(lanes._address(name or token))
    socket.send_fds(s, [token.encode()], list(descriptors))
    return s


def test_a_lane_hands_its_descriptors_over_and_ends_with_them() -> None:
    near, far = socket.socketpair()
    with awaited() as (lane, got, thread), near:
        fds = os.dup(far.fileno()), far.detach()
        carrier = threading.Thread(target=lanes.hand_over, args=(lane.token, *fds))
        carrier.start()
        thread.join(10)
        assert near.recv(100) == wire.LANE_READY
        os.write(got[0].wfd, b"data")
        assert near.recv(100) == b"data"
        assert carrier.is_alive()
        got.pop().close()
        carrier.join(10)
        assert not carrier.is_alive()
        assert near.recv(100) == b""


def test_a_token_is_good_for_one_lane() -> None:
    with awaited() as (lane, got, thread):
        with come(lane.token, 0, 1):
            thread.join(10)
        assert isinstance(got[0], lanes.Lane)
        r, w = os.pipe()
        with pytest.raises(ConnectError, match=r"each token is good for one lane"):
            lanes.hand_over(lane.token, r, w)
        os.close(r)
        os.close(w)


@pytest.mark.parametrize("descriptors", [(), (0,)])
def test_a_lane_without_both_descriptors_or_with_another_token_is_none(
    descriptors: tuple[int, ...],
) -> None:
    with awaited() as (lane, got, thread):
        come(lane.token, *descriptors).close()
        come("0" * 32, 0, 1, name=lane.token).close()
        come(lane.token[:-1], 0, 1, name=lane.token).close()
        assert thread.is_alive() and not got
        with come(lane.token, 0, 1):
            thread.join(10)
        assert isinstance(got[0], lanes.Lane)


@pytest.mark.root
def test_a_process_of_another_user_is_no_lane_and_uses_up_no_token() -> None:
    needs("root", "setpriv", "/usr/bin/python3")
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "s.connect(sys.argv[1].replace('@', chr(0))); print('connected', flush=True); "
        "socket.send_fds(s, [sys.argv[2].encode()], [0, 1]); s.recv(1)"
    )
    with awaited() as (lane, got, thread):
        name = lanes._address(lane.token).replace("\0", "@")
        words = [*NOBODY, "/usr/bin/python3", "-c", code, name, lane.token]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
        assert done.stdout == "connected\n", done.stderr
        assert thread.is_alive() and not got
        with come(lane.token, 0, 1):
            thread.join(10)
        assert isinstance(got[0], lanes.Lane)


@pytest.mark.root
def test_a_lane_hands_nothing_to_an_agent_of_another_user(tmp_path: Path) -> None:
    needs("root", "setpriv", "/usr/bin/python3")
    token = "0123456789abcdef" * 2
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "s.bind(sys.argv[1].replace('@', chr(0))); s.listen(1); print('ready', flush=True); "
        "c = s.accept()[0]; print(socket.recv_fds(c, 64, 2)[:2])"
    )
    name = lanes._address(token).replace("\0", "@")
    words = [*NOBODY, "/usr/bin/python3", "-c", code, name]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        r, w = os.pipe()
        try:
            with pytest.raises(ConnectError, match="no pyploop agent of this user"):
                lanes.hand_over(token, r, w)
        finally:
            os.close(r)
            os.close(w)
        assert other.stdout.read() == "(b'', [])\n"


def test_a_lane_that_does_not_come_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "COMING", 0.2)
    with awaited() as (_, got, thread):
        thread.join(10)
        assert "has not come within 0.2 s" in str(got[0])


def test_the_name_of_the_socket_does_not_tell_the_token() -> None:
    with awaited() as (lane, _, _):
        assert lane.token not in Path("/proc/net/unix").read_text()
        assert lanes._address(lane.token)[1:] in Path("/proc/net/unix").read_text()


# ---- requests


class Asking:
    """An end that asks an agent, and does not keep to anything."""

    def __init__(self, permits: Permits) -> None:
        self.theirs, ours = socket.socketpair()
        self.theirs.sendall(wire.hello(pyploop.__version__))
        self.ours = ours
        fd = ours.fileno()
        self.agent = CopyAgent(fd, fd, permits)
        self.thread = threading.Thread(target=self.agent.serve)
        self.thread.start()
        data = b""
        while not data.endswith(b"\n"):
            data += self.theirs.recv(1)
        fd = self.theirs.fileno()
        self.mux = Mux(fd, os.dup(fd))
        self._dup = self.mux._wfd
        self._number = 0

    def ask(self, op: Any, args: Any) -> dict[str, Any]:
        self._number += 1
        self.mux.send({"id": self._number, "op": op, "args": args})
        while (answer := self.mux.receive(20)).get("id") != self._number:
            pass
        return answer

    def close(self) -> None:
        self.mux.close()
        os.close(self._dup)
        self.theirs.close()
        self.thread.join(20)
        self.ours.close()


@pytest.fixture
def asking() -> Iterator[Callable[..., Asking]]:
    made: list[Asking] = []

    def make(permits: Permits | None = None) -> Asking:
        made.append(Asking(permits or Permits()))
        return made[-1]

    yield make
    for one in made:
        one.close()


BROKEN = {"timeout": 1, "number": 0, "committed": False}


@pytest.mark.parametrize(
    ("op", "args", "why"),
    [
        ("begin", {}, "unknown request"),
        ("digest", {"size": 1}, "must come after `look`"),
        ("hashes", {"level": 0, "nodes": [0]}, "must come after `digest`"),
        ("hashes", {"level": 0, "nodes": [0] * 33}, "33 values, 32 at most"),
        (None, {}, "unknown request"),
        ("target", {"path": "x"}, "missing: options"),
        ("target", {"path": 3, "options": {}}, "path: 3 is not a string"),
        ("target", {"path": "a\0b", "options": {}}, "contains a NUL"),
        ("target", {"path": "x", "options": {"evil": 1}}, "'evil' is not known here"),
        ("target", {"path": "x", "options": {"timeout": -1}}, "timeout: -1 is not a number"),
        ("source", {"path": "x", "options": {"tracker": "none"}}, "tracker: 'none'"),
        ("source", {"path": "x", "options": {"readers": 1 << 40}}, "readers"),
        ("source", {"path": "x", "options": {"stops": [{"kind": 1}]}}, "kind: 1"),
        ("source", {"path": "x", "options": {"stops": [{"kind": "cmd"}]}}, "wrong arguments"),
        ("source", {"path": "x", "options": {}}, "`lane` must come first"),
        ("receive", {}, "after `target`"),
        ("join", {"timeout": 1}, "`join` must come after"),
        ("lane", {"number": 1}, "lane 1 is not the next one"),
        ("lane", {"number": 4096}, "number: 4096 is not a number from 0 to 4095"),
        ("lane", {"number": -1}, "number: -1"),
        ("stay", {"retry": -1}, "retry: -1"),
        ("broken", {**BROKEN, "ends": []}, "must come after `stay`"),
        ("broken", {**BROKEN, "ends": [{"lane": 1}]}, "ends"),
        ("broken", {"timeout": 1, "ends": [], "committed": False}, "number"),
        ("again", {"number": 1}, "lane 1 is not the next one"),
        ("resume", {"number": 0}, "must come after `again`"),
        ("lanes", {"number": 1, "count": 2}, "lane 1 is not the next one"),
        ("lanes", {"number": 4090, "count": 10}, "there is no lane 4099"),
        ("lanes", {"number": 1, "count": 0}, "count: 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_the_agent_goes_on(
    asking: Callable[..., Asking], op: Any, args: Any, why: str
) -> None:
    end = asking()
    answer = end.ask(op, args)
    assert why in answer["error"]["message"], answer
    assert end.ask("check", {})["ok"]["version"] == pyploop.__version__


def test_several_lanes_are_asked_for_at_once(asking: Callable[..., Asking]) -> None:
    agent = asking()
    first = agent.ask("lane", {"number": 0})["ok"]["token"]
    tokens = agent.ask("lanes", {"number": 1, "count": 3})["ok"]["tokens"]
    assert len({first, *tokens}) == 4
    assert "lane 3 is not" in agent.ask("lane", {"number": 3})["error"]["message"]
    assert agent.ask("lane", {"number": 4})["ok"]["token"] not in tokens


def test_a_target_that_is_given_up_leaves_nothing(
    asking: Callable[..., Asking], tmp_path: Path
) -> None:
    end = asking()
    assert "ok" in end.ask("target", {"path": str(tmp_path / "got"), "options": {}})
    assert "one copy" in str(end.ask("target", {"path": str(tmp_path / "2"), "options": {}}))
    assert "ok" in end.ask("lane", {"number": 0})
    assert "not the next one" in str(end.ask("lane", {"number": 0}))
    assert "ok" in end.ask("undo", {})
    assert list(tmp_path.iterdir()) == []


def test_a_lane_that_does_not_come_fails_the_copy(
    asking: Callable[..., Asking], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "COMING", 0.2)
    end = asking()
    end.ask("target", {"path": str(tmp_path / "got"), "options": {}})
    end.ask("lane", {"number": 0})
    assert "ok" in end.ask("receive", {})
    error = end.ask("join", {"timeout": 20})["error"]
    assert "has not come within" in error["message"] and error["peer_failed"]
    assert list(tmp_path.iterdir()) == []


def test_an_agent_that_is_asked_nothing_ends(
    asking: Callable[..., Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "UNASKED", 0.2)
    end = asking()
    wait_until(lambda: not end.thread.is_alive(), "the agent ends")


@pytest.mark.parametrize(
    ("op", "value"),
    [
        ("check", {"version": "1", "aes": True, "source_options": []}),
        ("check", {"version": 1, "aes": True, "source_options": [], "target_options": []}),
        ("check", {"version": "1", "aes": True, "source_options": [[]], "target_options": []}),
        ("lane", {}),
        ("lane", {"token": "0" * 31}),
        ("lane", {"token": "0" * 31 + "\n"}),
        ("lane", {"token": "A" * 32}),
        ("join", {"done": 1}),
        ("join", {"done": True, "result": []}),
        ("stay", {"token": "0"}),
        ("broken", {"ready": True, "committed": False}),
        ("broken", {"ready": True, "committed": False, "ends": [[0, 1]]}),
        ("broken", {"ready": True, "committed": False, "ends": [{"lane": 0, "received": -1}]}),
        ("join", None),
    ],
)
def test_an_answer_that_makes_no_sense_ends_the_copy(op: str, value: Any) -> None:
    with pytest.raises(ProtocolError, match=f"a wrong answer to '{op}'"):
        copy_messages.answer(op, value)


def test_an_agent_compares_only_what_it_may_read_and_knows_what_is_there(
    asking: Callable[..., Asking], image: Path, tmp_path: Path
) -> None:
    limited = asking(Permits.of([], [str(tmp_path)], update=False, stops=False))
    assert "may not read" in limited.ask("look", {"path": str(image)})["error"]["message"]
    one = asking(Permits.of([str(tmp_path)], [], update=False, stops=False))
    size = one.ask("look", {"path": str(image)})["ok"]["size"]
    for op, args, why in (
        ("look", {"path": str(image)}, "must come once"),
        ("digest", {"size": size + 1}, f"has {size} bytes"),
        ("target", {"path": str(tmp_path / "x"), "options": {}}, "may not write"),
    ):
        assert why in one.ask(op, args)["error"]["message"]
    assert "ok" in one.ask("digest", {"size": size})
    while not (done := one.ask("join", {"timeout": 5})["ok"])["done"]:
        pass
    assert done["result"]["root"] == pyploop.verify(image, image).root
    for level, node in ((0, 5), (5, 0), (1, 1)):
        answer = one.ask("hashes", {"level": level, "nodes": [node]})
        assert "which is not there" in answer["error"]["message"]
    assert "must come once" in one.ask("digest", {"size": 1})["error"]["message"]


# ---- what an agent may be asked for


def test_permits_name_what_may_be_read_and_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "out")
    some = Permits.of([str(tmp_path / "in")], [str(tmp_path / "out")], update=False, stops=False)
    some.check_source(str(tmp_path / "in/disk"), {})
    some.check_target(str(tmp_path / "out/new"), {})
    some.check_target(str(tmp_path / "in/link/new"), {})
    for path in ("in/../other", "inn", "in/link/disk", "out/new"):
        with pytest.raises(ParameterError, match="may not read"):
            some.check_source(str(tmp_path / path), {})
    for path in ("in/new", "out/../new", "new"):
        with pytest.raises(ParameterError, match="may not write"):
            some.check_target(str(tmp_path / path), {})
    for option in ({"before_thaw": "evil"}, {"mounts": ["/"]}):
        with pytest.raises(ParameterError, match="runs no commands"):
            some.check_source(str(tmp_path / "in/disk"), option)
    with pytest.raises(ParameterError, match="replaces none"):
        some.check_target(str(tmp_path / "out/new"), {"update": True})


def test_a_device_behind_a_link_is_not_in_the_folder_of_the_link(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/disk").symlink_to("/dev/null")
    device = {"to_device": True}
    out = Permits.of([], [str(tmp_path / "out")], update=False, stops=False)
    for path in ("out/disk", "out/../other"):
        with pytest.raises(ParameterError, match="may not write"):
            out.check_target(str(tmp_path / path), device)
    null = Permits.of([], ["/dev/null"], update=False, stops=False)
    null.check_target(str(tmp_path / "out/disk"), device)


def test_an_agent_that_may_only_read_writes_nothing_and_one_without_limits_does(
    tmp_path: Path,
) -> None:
    reads = Permits.of([str(tmp_path)], [], update=False, stops=False)
    with pytest.raises(ParameterError, match="may not write"):
        reads.check_target(str(tmp_path / "x"), {})
    Permits.of([], [], update=False, stops=False).check_target(str(tmp_path / "x"), {})
    Permits.of([], [], update=False, stops=False).check_source("/dev/null", {"before_thaw": "x"})


# ---- what the other host reports


@pytest.mark.parametrize(
    ("kind", "fields", "good"),
    [
        (event_types.Phase, {"phase": "frozen", "bytes": None, "time": 0.0}, True),
        (event_types.Phase, {"phase": "frozen", "bytes": 7, "time": 0.0, "new": 1}, True),
        (event_types.Phase, {"phase": "frozen", "bytes": "7", "time": 0.0}, False),
        (event_types.Phase, {"phase": ["frozen"], "bytes": 7, "time": 0.0}, False),
        (event_types.Phase, {"bytes": 7, "time": 0.0}, False),
        (event_types.Progress, {"done": True, "dirty": "", "time": 0.0}, False),
        (event_types.Progress, {"done": 1, "dirty": "", "time": float("nan")}, False),
        (event_types.Frozen, {"steps": {"x": "y"}}, False),
    ],
)
def test_an_event_of_another_host_has_the_types_of_ours(
    kind: type[Any], fields: dict[str, Any], good: bool
) -> None:
    if good:
        assert "new" not in checked.checked(kind, fields)
    else:
        with pytest.raises(ValueError, match=kind.__name__):
            checked.checked(kind, fields)


def test_a_code_that_is_none_of_ours_becomes_a_failure_of_the_protocol() -> None:
    client = object.__new__(copy_client.CopyClient)
    client.host = "b"
    for code in (999, -1, True, "1", None, [1]):
        failure = client.failed_there({"code": code, "message": "x\x1b[2J"})
        assert isinstance(failure, ProtocolError)
        assert "\x1b" not in str(failure)
    assert isinstance(client.failed_there({"code": 1, "message": "x"}), CreateError)
    assert isinstance(client.failed_there("text"), ProtocolError)
