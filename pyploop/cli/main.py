# SPDX-License-Identifier: Apache-2.0
"""`pyploop [-v…] COMMAND …`: the global options, as ploop has them."""

if __name__ == "__main__":
    from pyploop.system import own_path

    own_path.leave_current_folder()

import contextlib
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from pyploop import __version__
from pyploop.errors import Interrupted, ParameterError, PyploopError, WriteError

DEFAULT_LEVEL = 3
RAISED_AGAIN = 0.005
"""Seconds until a signal whose exception Python dropped is raised once more."""
USAGE = """\
Usage: pyploop [-v...] [--version] COMMAND ...
       -v      one more level of messages (default 3; from 4 on with times)
       -vN     level N; -v-1 errors only, -v-2 silent
Commands:
       copy    copy a disk that is in use, or receive such a copy
       migrate move a container to another host, live
       trust   let a host send running containers to this one
       status  show how much of a container's memory is still to be loaded
       verify  compare a target with the receipt of its copy, or with its source
       sync    fsync files, as vzfsync does
       thaw    undo what killed copies have left frozen or stopped
       bench   measure what will limit a copy of a disk to a host, and for how long
       info    show what an image, a device or a DiskDescriptor.xml is
       demo    copy a temporary disk that is in use, and compare the copy
Started by pyploop itself, through ssh: agent, copy-agent, copy-lane
'pyploop COMMAND --help' shows the options of a command."""

Command = Callable[[list[str], int], int]


COMMANDS = (
    *("copy", "copy-agent", "copy-lane", "migrate", "agent", "trust", "status", "sync", "thaw"),
    *("info", "verify", "bench", "demo"),
)


def _command(name: str) -> Command:
    """Import the module of this command alone: a copy is short, so its start counts."""
    run: Command = importlib.import_module(f"pyploop.cli.{name.replace('-', '_')}").run
    return run


def parse_globals(args: list[str]) -> tuple[int, list[str]]:
    """(message level, the rest from the command on).  ParameterError for an
    unknown global option."""
    level = DEFAULT_LEVEL
    for i, arg in enumerate(args):
        if not arg.startswith("-") or arg == "-":
            return level, args[i:]
        if m := re.fullmatch(r"-v(-?\d+)", arg):
            level = int(m[1])
        elif re.fullmatch(r"-v+", arg):
            level += len(arg) - 1
        else:
            raise ParameterError(f"unknown option {arg}", hint="`pyploop --help` shows them")
    return level, []


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """SIGINT, SIGTERM, SIGHUP and SIGQUIT raise Interrupted, once, so that undoing is not
    interrupted.  SIGPIPE becomes an error of write."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

    def handler(signum: int, frame: FrameType | None) -> None:
        for s in names:
            # Not SIG_IGN: Python prints a warning about one that is already under way.
            signal.signal(s, lambda *_: None)
        raise Interrupted(signum)

    old = {s: signal.signal(s, handler) for s in names if signal.getsignal(s) != signal.SIG_IGN}
    # A file at its limit (RLIMIT_FSIZE) is an error of write, too.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    dropped = sys.unraisablehook

    def raise_again(args: "sys.UnraisableHookArgs") -> None:
        # Python drops what is raised in a destructor or in the callback of a weak
        # reference, so it would be lost.
        error = args.exc_value
        if not isinstance(error, Interrupted):
            dropped(args)
            return
        signum = error.signum

        def later(_number: int, _frame: FrameType | None) -> None:
            raise Interrupted(signum)

        signal.signal(signal.SIGALRM, later)
        signal.setitimer(signal.ITIMER_REAL, RAISED_AGAIN)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = dropped
        for s, previous in old.items():
            signal.signal(s, previous)


def _die_by(signum: int) -> int:
    """End as the signal would have ended us, so that a shell can tell."""
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
    os.kill(os.getpid(), signum)
    return 128 + signum


def _guard_standard_streams() -> None:
    """Open the closed ones of descriptors 0 to 2 on /dev/null.  Else a file or stream that
    we open would get that number, and with it the messages of commands."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number, so this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for text in (sys.stdout, sys.stderr):
        if isinstance(text, io.TextIOWrapper):
            # A file name need not be UTF-8.
            text.reconfigure(errors="backslashreplace")


def _drop_unwritten() -> None:
    """Keep the exit code when stdout or stderr cannot be written (the interpreter would end
    with 120)."""
    for fd, text in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if text is not None:
                text.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, fd)
            os.close(null)


def main(argv: list[str] | None = None) -> int:
    _guard_standard_streams()
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    finally:
        _drop_unwritten()


def program() -> NoReturn:
    """`main`, and the end of the process at once.

    Finalizing the interpreter takes 10 ms, and the caller may keep a container stopped
    until the copy has ended.
    """
    os._exit(main())


def _main(args: list[str]) -> int:
    try:
        with signals_raise():
            return _run(args)
    except PyploopError as e:
        print(f"pyploop: {e.with_hint()}", file=sys.stderr)
        return e.exit_code
    except Interrupted as e:
        return _die_by(e.signum)


def _print(text: str) -> None:
    """Print what was asked for; WriteError when stdout cannot be written."""
    try:
        print(text, flush=True)
    except OSError as e:
        raise WriteError.of("cannot write to stdout", e) from e


def _run(args: list[str]) -> int:
    if args in (["--help"], ["-h"]):
        _print(USAGE)
        return 0
    if args == ["--version"]:
        _print(f"pyploop {__version__}")
        return 0
    level, rest = parse_globals(args)
    if rest and rest[0] in COMMANDS:
        command = _command(rest[0])
        from pyploop.system import signals

        with signals.handled_here():
            return command(rest[1:], level)
    if rest:
        print(f"pyploop: unknown command {rest[0]!r}", file=sys.stderr)
    print(USAGE, file=sys.stderr)
    return ParameterError.exit_code


if __name__ == "__main__":
    program()
