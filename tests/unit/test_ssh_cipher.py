# SPDX-License-Identifier: Apache-2.0
"""ssh is asked for another cipher only where the user has no wish, and both CPUs are quick
with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import support

from pyploop.transport import ssh_cipher
from pyploop.transport.ssh_cipher import PREFERRED, choose, chosen, without_kex


@pytest.fixture
def ssh(tmp_path: Path) -> list[str]:
    """ssh with a configuration of its own, in which the host `picky` has a wish."""
    support.needs("ssh")
    config = tmp_path / "config"
    config.write_text("Host picky\n  Ciphers aes256-ctr\nHost *\n  Port 22\n")
    return ["ssh", "-F", str(config)]


def ciphers(words: list[str]) -> list[str]:
    done = subprocess.run([*words, "-G", "h"], capture_output=True, text=True, check=True)
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("ciphers "))
    return line.split()[1].split(",")


def test_the_quick_one_comes_first_and_no_other_is_lost(ssh: list[str]) -> None:
    before = ciphers(ssh)
    made = choose(ssh, (), "h", True)
    assert made.preferred
    after = ciphers([*ssh, *made.options])
    assert after[0] == PREFERRED
    assert sorted(after) == sorted(before)
    assert before[0] != PREFERRED


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ((), "picky"),
        (("-c", "aes256-ctr"), "h"),
        (("-oCiphers=aes128-ctr,aes256-ctr",), "h"),
        (("-oCiphers=^aes256-ctr",), "h"),
    ],
)
def test_a_wish_of_the_users_counts(ssh: list[str], options: tuple[str, ...], host: str) -> None:
    made = choose(ssh, options, host, True)
    assert not made.preferred
    assert "configuration or options" in made.why
    assert not any("Ciphers" in o for o in made.options)


def test_without_aes_nothing_is_asked_for(ssh: list[str]) -> None:
    made = choose(ssh, (), "h", False)
    assert not made.preferred
    assert "AES" in made.why


@pytest.mark.parametrize("text", ["exit 1", "echo host h", "exec sleep 60"])
def test_an_ssh_that_says_nothing_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setattr(ssh_cipher, "SECONDS", 0.3)
    for words in ([str(program)], [str(tmp_path / "absent")]):
        made = choose(words, (), "h", True)
        assert (made.options, made.preferred) == ((), False)
        assert "does not say" in made.why


def test_an_ssh_without_that_cipher_is_not_asked_for_it(tmp_path: Path) -> None:
    program = tmp_path / "ssh"
    program.write_text("#!/bin/sh\necho ciphers aes256-ctr,aes128-ctr\n")
    program.chmod(0o755)
    made = choose([str(program)], (), "h", True)
    assert not made.preferred
    assert "does not know" in made.why


def test_an_older_ssh_is_asked_without_what_it_does_not_know(tmp_path: Path) -> None:
    program = tmp_path / "ssh"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *LogVerbose*) exit 255;; esac\necho ciphers a,{PREFERRED}\n'
    )
    program.chmod(0o755)
    assert choose([str(program)], (), "h", True).options == (f"-oCiphers={PREFERRED},a",)


def test_what_was_agreed_on_is_read_and_left_out_of_messages() -> None:
    line = "debug1: kex.c:kex_choose_conf():1091 (pid=7): kex: {}: {} MAC: <implicit>\n"
    text = line.format("server->client cipher", "a") + line.format("client->server cipher", "b")
    text += "Permission denied\n"
    assert chosen(text) == "b"
    assert without_kex(text) == "Permission denied\n"
    assert chosen("Permission denied") == ""
