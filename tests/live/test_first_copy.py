# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/tutorial/first-copy.md, run as a reader types them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import tutorial
from support import needs, pyploop_cmd, pyploop_env, run

pytestmark = pytest.mark.root
_STEP = "--- step"


def program(folder: Path) -> dict[str, str]:
    """An environment in which `pyploop` is the one under test."""
    words = " ".join(pyploop_cmd())
    script = folder / "pyploop"
    script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    script.chmod(0o755)
    env = pyploop_env()
    return env | {"PATH": f"{folder}:{env.get('PATH', os.defpath)}:/usr/sbin:/sbin"}


def clean_up(folder: Path) -> None:
    """What the page's last block does, when an earlier one failed."""
    image = folder / "disk.img"
    for point in ("look", "mnt"):
        run("umount", "-q", str(folder / point), check=False)
    listed = run("losetup", "-nO", "NAME", "-j", str(image), check=False)
    for device in str(listed).split():
        run("losetup", "--detach", device, check=False)


def test_the_blocks_of_the_first_copy_run_in_order_and_leave_nothing(tmp_path: Path) -> None:
    needs("root", "loop", "losetup", "mkfs.ext4")
    page = tutorial.TUTORIAL / "first-copy.md"
    steps = [f"echo '{_STEP} {n}'\n{b}" for n, b in enumerate(tutorial.blocks(page))]
    (tmp_path / "bin").mkdir()
    shell = subprocess.Popen(
        ["bash", "-e", "-o", "pipefail", "-c", "\n".join(steps)],
        cwd=tmp_path,
        env=program(tmp_path / "bin"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = shell.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the page's writer is one of them
            os.killpg(shell.pid, signal.SIGKILL)
        shell.communicate()
        clean_up(tmp_path / "pyploop-tutorial")
    assert shell.returncode == 0, out + errors
    assert os.listdir(tmp_path) == ["bin"]
    output = dict(re.findall(rf"{_STEP} (\d+)\n(.*?)(?=^{_STEP}|\Z)", out, re.M | re.S))
    assert "bpf" in output["1"], "the page says which tracker is used"
    (copied,) = [
        o for o in output.values() if "disk.img" not in o and re.search(r"^\d+\n\d+$", o, re.M)
    ]
    frozen, later = (int(n) for n in re.findall(r"^(\d+)$", copied, re.M)[-2:])
    assert 0 < frozen < later
