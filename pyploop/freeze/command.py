# SPDX-License-Identifier: Apache-2.0
"""Run the user's commands around the freeze.

Their stdin is /dev/null, and their stdout is our stderr, since ours may be the
stream of the copy.  They get a session of their own and are ended at a deadline.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence

from pyploop.errors import CommandError
from pyploop.system import signals
from pyploop.system.worker import wait_for

KILL_GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL of a command that is ended."""
LONGEST_ANSWER = 4096
"""Characters kept of what a command answers."""


def run_command(command: str, what: str, timeout: float | None = None) -> None:
    """Run a shell command of the user's; CommandError unless it exits 0 within
    `timeout` seconds."""
    code = exit_code(["/bin/sh", "-c", command], f"{what} {command!r}", timeout)
    if code:
        raise CommandError(f"{what} {command!r} exited with {code}")


def exit_code(argv: Sequence[str], what: str, timeout: float | None) -> int:
    """Run it and return its exit code.  CommandError: it did not end within `timeout`
    seconds, or was killed by a signal."""
    code = _wait(_start(argv, what, 2 if _stderr_open() else subprocess.DEVNULL), what, timeout)
    if code < 0:
        raise CommandError(f"{what} was killed by signal {-code}")
    return code


def answer(argv: Sequence[str], what: str, timeout: float) -> tuple[int, str]:
    """Run it; returns (exit code, the beginning of its stdout).  CommandError as above."""
    process = _start(argv, what, subprocess.PIPE)
    try:
        out, _ = process.communicate(timeout=timeout)
    except BaseException as e:
        _end(process)
        if isinstance(e, subprocess.TimeoutExpired):
            raise CommandError(f"{what} did not end within {timeout:g} s") from None
        raise
    finally:
        assert process.stdout is not None
        process.stdout.close()
    if process.returncode < 0:
        raise CommandError(f"{what} was killed by signal {-process.returncode}")
    return process.returncode, out[:LONGEST_ANSWER].decode(errors="replace")


def _start(argv: Sequence[str], what: str, stdout: int) -> subprocess.Popen[bytes]:
    try:
        return signals.begun(
            lambda: subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=stdout, start_new_session=True
            ),
            _end,
        )
    except OSError as e:
        raise CommandError.of(f"cannot run {what}", e) from e


def _wait(process: subprocess.Popen[bytes], what: str, timeout: float | None) -> int:
    try:
        return wait_for(process, timeout)
    except BaseException as e:
        _end(process)
        if isinstance(e, subprocess.TimeoutExpired):
            raise CommandError(f"{what} did not end within {timeout:g} s") from None
        raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and the processes of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(KILL_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stderr_open() -> bool:
    try:
        os.fstat(2)
    except OSError:
        return False
    return True
