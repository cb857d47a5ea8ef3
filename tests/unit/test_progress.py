# SPDX-License-Identifier: Apache-2.0
"""The bar of `pyploop copy --progress` on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

from support import MIB, needs, pyploop_cmd, pyploop_env


def copy_on_a_terminal(folder: Path, *options: str, path: Path | None = None) -> tuple[int, str]:
    """(exit code, what the terminal shows) of a copy of 1 MiB."""
    source = folder / "source"
    source.write_bytes(os.urandom(MIB))
    env = pyploop_env({"TERM": "xterm", "COLUMNS": "100"})
    if path is not None:
        env["PYTHONPATH"] = str(path)
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*pyploop_cmd(), "copy", *options, "-s", str(source), "-d", str(folder / "target")],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            env=env,
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # EIO: the last one to have it open has ended
                break
            if not part:
                break
            shown += part
        return process.wait(60), shown.decode(errors="replace")
    finally:
        os.close(ours)


def test_a_copy_on_a_terminal_shows_a_bar_that_ends_full(tmp_path: Path) -> None:
    needs("module:rich")
    code, shown = copy_on_a_terminal(tmp_path, "--progress")
    assert code == 0, shown
    assert "done" in shown and "1.0/1.0 MiB" in shown
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()


def test_without_rich_the_bar_is_refused_with_what_to_install(tmp_path: Path) -> None:
    hidden = tmp_path / "site"
    hidden.mkdir()
    (hidden / "rich.py").write_text("raise ModuleNotFoundError('hidden')\n")
    code, shown = copy_on_a_terminal(tmp_path, "--progress", path=hidden)
    assert code == 38
    assert "pip install 'pyploop[progress]'" in shown and "Traceback" not in shown
    assert not (tmp_path / "target").exists()
    assert copy_on_a_terminal(tmp_path, path=hidden)[0] == 0  # nothing else needs it
