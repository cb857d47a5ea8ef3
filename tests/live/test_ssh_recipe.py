# SPDX-License-Identifier: Apache-2.0
"""The lines of docs/internals/trust.md for a source's key, over a real sshd: they let a
container come, and nothing else."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import support

from pyploop.cli import agent

ROOT = Path(__file__).resolve().parents[2]
_SSHD = """\
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
{recipe}
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
PidFile none
Subsystem sftp internal-sftp
"""
_SSH = """\
Host target
  HostName 127.0.0.1
  Port {port}
  User root
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  ForwardAgent yes
"""


def recipe() -> tuple[str, str]:
    """(the options of the key, the line of sshd_config), as the page has them."""
    page = (ROOT / "docs/internals/trust.md").read_text()
    (key,) = re.findall(
        r"^(restrict,\S+,command=\"pyploop agent .*\") ssh-ed25519 AAAA", page, re.MULTILINE
    )
    (login,) = re.findall(r"^PermitRootLogin .*$", page, re.MULTILINE)
    return key, login


@dataclass(frozen=True)
class Target:
    folder: Path
    port: int

    def allow(self, address: str, *lines: str) -> None:
        """The recipe for the source's key, with its address and our agent."""
        words = [*support.pyploop_cmd(), "agent", "--config", str(self.folder / "b/migrate.toml")]
        if "--source" in agent.parser().format_help():
            words += ["--source", "hosta"]
        command = shlex.join(words)
        options = recipe()[0].replace('from="192.0.2.10"', f'from="{address}"')
        options = re.sub(r'command=".*"', lambda _: f'command="{command}"', options)
        key = (self.folder / "key.pub").read_text().strip()
        (self.folder / "authorized_keys").write_text("\n".join([f"{options} {key}", *lines]) + "\n")

    def ssh(self, *words: str) -> subprocess.CompletedProcess[str]:
        config = str(self.folder / "ssh_config")
        return subprocess.run(
            ["ssh", "-F", config, "-oBatchMode=yes", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def migrate(self) -> subprocess.CompletedProcess[str]:
        config = str(self.folder / "a/migrate.toml")
        return subprocess.run(
            [*support.pyploop_cmd(), "migrate", "--config", config, "target", "box"],
            env=support.pyploop_env(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )


def configure(folder: Path, status: str, remote: str = "") -> None:
    """A host with a container that is a directory, and stopped or absent."""
    folder.mkdir()
    commands = "".join(
        f'{step} = ["true"]\n' for step in ("start", "stop", "abandon", "kill", "resume", "suspend")
    )
    (folder / "migrate.toml").write_text(
        f'state_dir = "{folder}/state"\nlock_dir = "{folder}/lock"\nimages_dir = "{folder}"\n'
        f'{remote}[container.box]\nruntime = "command"\ntree = {{path = "{folder}/tree"}}\n'
        f'[container.box.commands]\nstatus = ["echo", "{status}"]\n{commands}'
    )


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    """An sshd on the loopback interface with the recipe's line, for root."""
    support.needs("root", "ssh", "ssh-keygen", "rsync")
    if not Path("/usr/sbin/sshd").exists():
        support.needs("/usr/sbin/sshd")
    for name in ("host_key", "key", "other"):
        support.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    text = _SSHD.format(folder=tmp_path, port=port, recipe=recipe()[1])
    (tmp_path / "sshd_config").write_text(text)
    (tmp_path / "ssh_config").write_text(_SSH.format(folder=tmp_path, port=port))
    host = " ".join((tmp_path / "host_key.pub").read_text().split()[:2])
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{port} {host}\n")
    # The source asks for a shell in the agent's place: the key decides.
    ssh = f'[remote]\nssh = ["ssh", "-F", "{tmp_path}/ssh_config"]\n'
    ssh += f'agent = ["touch", "{tmp_path}/pwned"]\n'
    configure(tmp_path / "a", "stopped", ssh)
    configure(tmp_path / "b", "absent")
    # It stays, for tests run side by side (support_ssh.py).
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    words = ["/usr/sbin/sshd", "-D", "-e", "-f", str(tmp_path / "sshd_config")]
    with (tmp_path / "sshd.log").open("wb") as log:
        daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        support.wait_until(lambda: listening(port), "sshd listens")
        yield Target(tmp_path, port)
        assert not (tmp_path / "pwned").exists()
    finally:
        daemon.kill()
        daemon.wait()


def listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_a_container_moves_by_the_key_of_the_recipe(target: Target) -> None:
    tree = target.folder / "a/tree"
    tree.mkdir()
    (tree / "file").write_text("the container's")
    target.allow("127.0.0.1")
    done = target.migrate()
    assert done.returncode == 0, done.stderr + (target.folder / "sshd.log").read_text()
    assert (target.folder / "b/tree/file").read_text() == "the container's"
    assert os.listdir(tree) == []


def test_the_key_of_the_recipe_runs_the_agent_and_nothing_else(target: Target) -> None:
    target.allow("127.0.0.1")
    done = target.ssh("target", f"touch {target.folder}/pwned; id")
    assert "uid=" not in done.stdout
    assert done.stdout.startswith("PYPLOOP-AGENT")
    done = target.ssh("-tt", "target", f"touch {target.folder}/pwned")
    assert "PTY allocation request failed" in done.stderr
    done = target.ssh("-W", f"127.0.0.1:{target.port}", "target")
    assert (done.returncode, done.stdout) == (255, "")
    assert "prohibited" in done.stderr
    assert target.ssh("-s", "target", "sftp").stdout.startswith("PYPLOOP-AGENT")


def test_the_key_of_the_recipe_is_of_no_use_from_elsewhere(target: Target) -> None:
    target.allow("192.0.2.10")
    done = target.ssh("target")
    assert (done.returncode, "Permission denied" in done.stderr) == (255, True)
    (target.folder / "a/tree").mkdir()
    done = target.migrate()
    assert (done.returncode, "no pyploop agent on target" in done.stderr) == (4, True)


def test_a_key_without_a_command_does_not_let_root_in(target: Target) -> None:
    target.allow("127.0.0.1", (target.folder / "other.pub").read_text().strip())
    other = ["-F", "none", "-p", str(target.port), "-i", str(target.folder / "other")]
    other += [f"-oUserKnownHostsFile={target.folder}/known_hosts", "-oIdentitiesOnly=yes"]
    done = subprocess.run(
        ["ssh", *other, "-oBatchMode=yes", "root@127.0.0.1", "id"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (255, "")
    assert "ROOT LOGIN REFUSED" in (target.folder / "sshd.log").read_text()
