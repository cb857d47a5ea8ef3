# SPDX-License-Identifier: Apache-2.0
"""Another host without ssh: a script that has its name runs the command on this one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import pyploop_cmd, pyploop_env

SSH = """\
#!/bin/sh
case " $* " in *" -G "*) exit 1 ;; esac
for last; do :; done
cd "$HOME" && exec sh -c "$last"
"""
PYPLOOP = f'#!/bin/sh\nexec {" ".join(pyploop_cmd())} "$@"\n'


def fake_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes it, for what this process starts; returns the user's home there."""
    home, programs = folder / "home", folder / "bin"
    home.mkdir()
    programs.mkdir()
    for name, text in (("ssh", SSH), ("pyploop", PYPLOOP)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(home))
    for name, value in pyploop_env().items():
        if name not in ("PATH", "HOME"):
            monkeypatch.setenv(name, value)
    return home
