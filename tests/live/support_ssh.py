# SPDX-License-Identifier: Apache-2.0
"""ssh to this machine without a port or a daemon: sshd -i behind the client's
ProxyCommand, with keys and configuration of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from support import needs, run

SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
SSH = """\
Host here
  User root
  ProxyCommand /usr/sbin/sshd -i -f {folder}/sshd_config
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking no
  LogLevel ERROR
  BatchMode yes
"""


@contextlib.contextmanager
def ssh_here(folder: Path) -> Iterator[list[str]]:
    """The beginning of an ssh command line."""
    needs("root", "ssh", "ssh-keygen")
    if not Path("/usr/sbin/sshd").exists():
        needs("/usr/sbin/sshd")
    folder.mkdir()
    for name in ("host_key", "key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    # sshd's own folder, which its service makes; it stays, for tests run side by side.
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    yield ["ssh", "-F", str(folder / "ssh_config"), "here"]
