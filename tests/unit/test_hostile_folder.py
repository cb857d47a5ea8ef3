# SPDX-License-Identifier: Apache-2.0
"""pyploop called in a folder where somebody else has put modules of theirs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import pyploop_cmd, pyploop_env

from pyploop.migration import relay
from pyploop.system import enclosure
from pyploop.undo import watchdog

MODULES = (
    "__future__",
    *("argparse", "contextlib", "ctypes", "errno", "fcntl", "hashlib", "importlib", "io", "json"),
    *("random", "re", "rich", "select", "selectors", "shutil", "signal", "socket", "stat"),
    *("subprocess", "tempfile", "threading", "time", "tomllib", "typing", "cffi", "numpy"),
)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Each module in it leaves a file when somebody imports it."""
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)"
        )
    return tmp_path


def leave_to_python(folder: Path) -> None:
    """Remove what `python3 -m` itself imports before anything of ours."""
    for name in ("contextlib", "importlib"):
        (folder / f"{name}.py").unlink()


def run_in(folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        words,
        cwd=folder,
        env=pyploop_env(env),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert not (folder / "ran").exists(), (folder / "ran").read_text()
    return done


@pytest.mark.parametrize("way", ["script", "module"])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["copy", "--help"], 0),
        (["migrate", "--recover", "--config", "/nonexistent"], 1),
        (["agent"], 13),
        (["thaw"], 0),
        (["info", "/dev/null"], 2),
    ],
)
def test_commands_import_nothing_of_the_current_folder(
    hostile: Path, words: list[str], code: int, way: str
) -> None:
    command = [os.path.join(sysconfig.get_path("scripts"), "pyploop")]
    if way == "module":
        command = pyploop_cmd()
        leave_to_python(hostile)
    done = run_in(hostile, *command, *words)
    assert done.returncode == code, done.stderr


def test_the_alias_is_made_without_an_import_from_the_current_folder(
    hostile: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = [sys.executable, "-m", "pyploop.libploop", "--alias"]
    leave_to_python(hostile)
    done = run_in(hostile, *words, str(tmp_path_factory.mktemp("alias")))
    assert done.returncode == 0, done.stderr


def test_the_demo_imports_nothing_of_the_current_folder(hostile: Path) -> None:
    (hostile / "pyploop").mkdir()
    (hostile / "pyploop/__init__.py").write_text(f"open({str(hostile / 'ran')!r}, 'w')")
    command = [sys.executable, "-P", "-m", "pyploop.cli.main", "demo"]
    # Without privileges' way, which is the shorter one, where there are no loop devices.
    done = run_in(hostile, *command, PATH="")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("program", [watchdog, relay, enclosure])
def test_what_is_started_by_its_path_imports_nothing_of_its_folder_or_the_environments(
    hostile: Path, program: object
) -> None:
    path = str(getattr(program, "__file__", ""))
    copy = hostile / os.path.basename(path)
    copy.write_text(Path(path).read_text())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.close()
        subprocess.run(
            [sys.executable, "-I", "-S", copy, "1", str(theirs.fileno()), ""],
            cwd=hostile,
            env={**os.environ, "PYTHONPATH": str(hostile), "PYTHONSTARTUP": str(hostile / "re.py")},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=60,
        )
    assert not (hostile / "ran").exists()
