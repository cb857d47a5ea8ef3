# SPDX-License-Identifier: Apache-2.0
"""What ssh gives to the target: a connection, and nothing else of the user's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import support

from pyploop.errors import MigrateError
from pyploop.migration.source import agent_client

_EAGER = """\
Host *
  ForwardAgent yes
  ForwardX11 yes
  ForwardX11Trusted yes
  GSSAPIDelegateCredentials yes
  LocalForward 18080 other:80
  RemoteForward 18081 other:80
  DynamicForward 11080
  Tunnel yes
  PermitLocalCommand yes
  LocalCommand touch /nonexistent/file
  RemoteCommand cat
  UpdateHostKeys yes
"""
OFF = {
    "forwardagent": "no",
    "forwardx11": "no",
    "gssapidelegatecredentials": "no",
    "clearallforwardings": "yes",
    "tunnel": "false",
    "permitlocalcommand": "no",
    "updatehostkeys": "false",
}
_RECORDS = "import json, sys; open(sys.argv[1], 'w').write(json.dumps(sys.argv[2:]))\n"


def command(tmp_path: Path, *options: str) -> list[str]:
    """What `Remote` runs, without the program."""
    ssh = [sys.executable, "-c", _RECORDS, str(tmp_path / "words")]
    with pytest.raises(MigrateError) as failure:
        agent_client.Remote("host", ssh, options, ["pyploop", "agent"])
    assert failure.value.exit_code == 4
    return list(json.loads((tmp_path / "words").read_text()))


def effective(tmp_path: Path, *options: str) -> dict[str, str]:
    """How ssh itself reads it."""
    support.needs("ssh")
    (tmp_path / "config").write_text(_EAGER)
    words = command(tmp_path, *options)
    assert words[-3:] == ["--", "host", "pyploop agent"]
    done = subprocess.run(
        ["ssh", "-F", tmp_path / "config", *words[:-3], "-G", "host"],
        capture_output=True,
        text=True,
        check=True,
    )
    pairs = (line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    return dict(pairs)


def test_nothing_is_forwarded_whatever_ssh_config_says(tmp_path: Path) -> None:
    read = effective(tmp_path)
    assert {key: read.get(key) for key in OFF} == OFF
    assert not {"localforward", "remoteforward", "dynamicforward", "remotecommand"} & set(read)


@pytest.mark.parametrize(
    "option",
    ["-A", "-oForwardAgent=yes", "-X", "-Y", "-oForwardX11=yes", "-K", "-L1:x:1", "-R1:x:1"],
)
def test_nothing_is_forwarded_by_an_option_for_ssh_either(tmp_path: Path, option: str) -> None:
    read = effective(tmp_path, option)
    assert {key: read.get(key) for key in OFF} == OFF
    assert not {"localforward", "remoteforward"} & set(read)


def test_the_users_own_options_come_first_and_count(tmp_path: Path) -> None:
    read = effective(tmp_path, "-oConnectTimeout=3", "-p", "2222", "-oServerAliveInterval=9")
    assert (read["connecttimeout"], read["port"], read["serveraliveinterval"]) == ("3", "2222", "9")
    assert read["batchmode"] == "yes"
