# SPDX-License-Identifier: Apache-2.0
"""A stopped container of more disks and trees than the first agents had numbers of
channels for: 63, of which each tree took five."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import support

DISKS, TREES = 8, 16


def host(folder: Path, peer: Path) -> None:
    """Its configuration; `there` in the folder is the container."""
    for name in ("lock", "images"):
        (folder / name).mkdir(parents=True)
    ssh = folder / "ssh"
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nexec sh -c "$3"\n')
    ssh.chmod(0o755)
    agent = [*support.pyploop_cmd(), "agent", "--config", str(peer / "migrate.toml")]
    status = f"test -e {folder}/there && echo stopped || echo absent"
    steps = {
        "status": ["sh", "-c", status],
        **{step: ["touch", f"{folder}/there"] for step in ("start", "stop")},
        "abandon": ["rm", "-f", f"{folder}/there"],
    }
    text = "".join(f'{n}_dir = "{folder}/{n}"\n' for n in ("state", "lock", "images"))
    text += f'[remote]\nssh = ["{ssh}"]\nagent = {json.dumps(agent)}\n'
    text += '[container.box]\nruntime = "command"\n[container.box.commands]\n'
    text += "".join(f"{step} = {json.dumps(words)}\n" for step, words in steps.items())
    for n in range(DISKS):
        text += f'[[container.box.disk]]\nimage = "{folder}/disks/{n}.img"\n'
        text += f'mount = "{folder}/mounts/{n}"\nfstype = "ext4"\noptions = "ro"\n'
    for n in range(TREES):
        text += f'[[container.box.tree]]\npath = "{folder}/tree{n}"\n'
    (folder / "migrate.toml").write_text(text)


def test_a_container_of_many_disks_and_trees_moves(tmp_path: Path) -> None:
    support.needs("root", "loop", "mkfs.ext4", "rsync")
    a, b = tmp_path / "a", tmp_path / "b"
    host(a, b)
    host(b, a)
    (a / "there").touch()
    (a / "disks").mkdir()
    empty = tmp_path / "empty.img"
    empty.write_bytes(bytes(256 << 10))
    support.run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", empty)
    contents = []
    for n in range(DISKS):
        image = a / f"disks/{n}.img"
        # At the end, which the file system does not use.
        contents.append(empty.read_bytes() + n.to_bytes(4096, "little"))
        image.write_bytes(contents[-1])
    for n in range(TREES):
        (a / f"tree{n}").mkdir()
        (a / f"tree{n}/file").write_text(str(n))
    try:
        words = ["migrate", "--config", str(a / "migrate.toml"), "other", "box"]
        done = subprocess.run(
            [*support.pyploop_cmd(), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=support.pyploop_env(),
        )
        assert done.returncode == 0, done.stderr
        for n in range(TREES):
            assert (b / f"tree{n}/file").read_text() == str(n)
        for n in range(DISKS):
            assert (b / f"disks/{n}.img").read_bytes() == contents[n]
        assert not list((a / "disks").iterdir())
    finally:
        for n in range(DISKS):
            subprocess.run(["umount", str(b / f"mounts/{n}")], capture_output=True, check=False)
