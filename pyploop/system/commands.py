# SPDX-License-Identifier: Apache-2.0
"""Commands of a runtime: run without a shell, with a deadline.  An error shows the last
lines of their output."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from collections.abc import Callable, Mapping, Sequence

from pyploop.errors import MigrateError
from pyploop.system import signals

BEGUN = 120.0
"""Seconds for a command to end when a signal came while it was being started."""


class Command:
    """A started command, in a session of its own.  So ^C at the terminal reaches only this
    process: an interrupted dump would be worse than a late answer."""

    def __init__(
        self,
        argv: Sequence[str],
        keep_fds: Sequence[int] = (),
        *,
        silent: bool = False,
        env: Mapping[str, str] | None = None,
        groups: Sequence[int] | None = None,
    ) -> None:
        """silent: its output goes to /dev/null.  A container inherits the output, and could
        not be checkpointed with a file of this host open.  groups: its supplementary groups;
        None: ours.  OSError when it cannot be run."""
        self.argv = list(argv)
        # Not a file in a folder: a full one would keep the command from being run, and it
        # may be the one that resumes the container.
        self._output = os.fdopen(os.memfd_create("pyploop-output"), "w+b")
        try:
            self._process = signals.begun(
                lambda: subprocess.Popen(
                    self.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if silent else self._output,
                    stderr=subprocess.DEVNULL if silent else self._output,
                    pass_fds=tuple(keep_fds),
                    env=env,
                    start_new_session=True,
                    extra_groups=groups,
                ),
                _outlast,
            )
        except BaseException:
            self._output.close()
            raise
        self.end_fd: int | None = None
        """Readable when the command has ended.  Popen.wait(timeout) looks at growing intervals,
        of up to 50 ms.  None: a kernel before 5.3.  Closed by `wait`."""
        with contextlib.suppress(OSError):
            self.end_fd = os.pidfd_open(self._process.pid)

    def wait(self, timeout: float) -> tuple[int, str]:
        """(exit status, its output).  TimeoutError when it takes longer; then it is killed."""
        try:
            try:
                self._end(timeout)
                status = self._process.wait(0.0 if self.end_fd is not None else timeout)
            except subprocess.TimeoutExpired:
                raise
            except BaseException:
                # Raised by a signal.  The command must end before another one undoes it.
                self._process.wait(timeout)
                raise
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise TimeoutError(f"it did not end within {timeout:g} s") from None
        finally:
            fd, self.end_fd = self.end_fd, None
            if fd is not None:
                os.close(fd)
        with self._output as f:
            f.seek(0)
            return status, f.read().decode(errors="replace")

    def _end(self, timeout: float) -> None:
        """Wait until it has ended, at most so long."""
        if self.end_fd is not None:
            poll = select.poll()
            poll.register(self.end_fd, select.POLLIN)
            poll.poll(min(timeout * 1000, 1 << 30))

    def ended(self) -> bool:
        return self._process.poll() is not None


def _outlast(process: subprocess.Popen[bytes]) -> None:
    """Wait for the command, so that it ends before another one undoes it."""
    try:
        process.wait(BEGUN)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def detached(
    argv: Sequence[str], pass_fds: Sequence[int], cwd: str | os.PathLike[str] = "/"
) -> subprocess.Popen[bytes]:
    """A started program that may outlive this process: in a session of its own, without input
    and output.  OSError when it cannot be run."""
    return signals.begun(
        lambda: subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=pass_fds,
            cwd=cwd,
            start_new_session=True,
        ),
        lambda program: program.kill(),
    )


def run(
    argv: Sequence[str] | Command,
    code: int,
    timeout: float,
    keep_fds: Sequence[int] = (),
    *,
    silent: bool = False,
    env: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> str:
    """Run a command; returns its output.  MigrateError(code) unless it exits with 0.
    argv: or one that was started ahead, with all options of its own.
    meanwhile: called while the command runs.  When it raises, the exception goes on after
    the command has ended."""
    failure: BaseException | None = None
    words = argv.argv if isinstance(argv, Command) else argv
    try:
        if isinstance(argv, Command):
            command = argv
        else:
            command = Command(argv, keep_fds, silent=silent, env=env)
        if meanwhile is not None:
            try:
                meanwhile()
            except BaseException as e:
                failure = e
        status, output = command.wait(timeout)
    except FileNotFoundError as e:
        raise MigrateError(
            code,
            f"cannot run `{' '.join(words)}`: there is no program {words[0]} on this host",
            hint="install it, or write its path into migrate.toml",
        ) from e
    except OSError as e:  # TimeoutError is one
        raise MigrateError(code, f"{' '.join(words)}: {e.strerror or e}") from e
    if failure is not None:
        raise failure
    if status:
        raise MigrateError(code, f"{' '.join(words)} ended with {status}: {last_words(output)}")
    return output


def last_words(text: str) -> str:
    """The last three lines of some output, as one."""
    lines = text.strip().splitlines()[-3:]
    return "; ".join(line.strip() for line in lines) or "it printed nothing"
