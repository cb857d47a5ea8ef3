# SPDX-License-Identifier: Apache-2.0
"""rsync(1) as a migration uses it: its client at the source, its server at the agent.

The server is rsync's own daemon, on a channel instead of a port.  The agent writes its
configuration, with one module, its chroot, and the options that it accepts.  So the peer
can name no other place, read nothing, and run nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyploop.errors import MigrateError, VzExitCode, WriteError
from pyploop.migration import deadlines
from pyploop.migration import relay as relay_program
from pyploop.migration.itemized import Itemized
from pyploop.system import descriptors, enclosure
from pyploop.system.commands import last_words
from pyploop.system.stderr_tail import LastWords
from pyploop.units import GIB

OLDEST = (3, 2)
"""The first version whose daemon can refuse all options except some."""
ALWAYS = (
    # The second X: also the attributes that rsync --fake-super writes (user.rsync.%stat).
    "-aHAXXSx",
    "--numeric-ids",
    # Times to the nanosecond: a change within the same second is seen.
    "--modify-window=-1",
    "--out-format=%i %n",
)
TREE = ("--delete",)
"""Options of a pass over the whole tree."""
CHANGING = ("--no-inc-recursive",)
"""Options of a pass over a tree that changes meanwhile.  If the tree has hard links, an
rsync that lists it bit by bit (3.5.0) may wait forever for a name that has moved away."""
FED = "--files-from=-"
_LISTED = (FED, "--from0", "--ignore-missing-args")
COMPARED = (*_LISTED, "--checksum")
"""Options of a pass over files by name, compared by their contents.  Files that are removed
meanwhile are left to the next pass."""
PARTED = (*_LISTED, "--ignore-times")
"""The same, where files at the target have several names.  Each file is written anew, with
the names that it has at the source.  With COMPARED, a name of another file with the same
contents would stay a name of that file."""
VANISHED, PARTIAL = 24, 23
_OPENS_FIFO = ("wait_for_partner", "fifo_open")
"""The kernel's functions in which open(2) waits for a FIFO's other end."""

_TAKEN = (
    "a hard-links acls xattrs sparse one-file-system numeric-ids modify-window log-format "
    "delete delete-during relative no-r no-recursive dirs ignore-times checksum checksum-choice "
    "compress* new-compress old-compress whole-file no-whole-file block-size bwlimit timeout "
    "inplace partial"
)
"""The options that our client sends, and those that a user may add."""
_CONFIG = """\
use chroot = yes
uid = 0
gid = 0
read only = no
write only = yes
list = no
numeric ids = yes
munge symlinks = no
reverse lookup = no
timeout = {stall}
log file = {log}
refuse options = * {taken}
[tree]
path = {path}
"""


def check_installed(command: str) -> None:
    """MigrateError(6) when rsync is not installed, or too old."""
    if shutil.which(command) is None:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{command} is not installed on this host, and it copies a container's directories",
            path=command,
            hint="install it, or set rsync.command in migrate.toml",
        )
    done = subprocess.run(
        [command, "--version"], capture_output=True, check=False, timeout=deadlines.RSYNC_VERSION
    )
    found = re.match(rb"rsync +version v?(\d+)\.(\d+)", done.stdout)
    if found is None:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{command} on this host is not rsync: its --version does not print rsync's version",
            path=command,
            hint="set rsync.command in migrate.toml",
        )
    if (int(found[1]), int(found[2])) < OLDEST:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{command} on this host is {found[0].decode()}, and 3.2 or newer is needed",
            path=command,
        )


def _environment() -> dict[str, str]:
    """The environment without variables that change what rsync does, and with messages in
    English."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RSYNC_")}
    return kept | {"LC_ALL": "C"}


# ---- the client


@dataclass(frozen=True)
class Done:
    """An rsync that has ended."""

    status: int
    errors: str
    items: Itemized

    def explain(self, what: str) -> MigrateError:
        return MigrateError(
            VzExitCode.COPY_FAILED,
            f"rsync of {what} ended with status {self.status}: {self.errors}",
            path=what,
        )


class Client:
    """The client of one pass.  It is started, and waits for its channel."""

    def __init__(self, command: str, words: Sequence[str], source: str) -> None:
        """words: options.  source: the tree's path on this host."""
        ours, theirs = socket.socketpair()
        self._control = ours
        self._errors = LastWords()  # they include the server's errors
        self.items = Itemized()
        self._source = source
        python, relay = os.path.realpath(_interpreter()), str(Path(relay_program.__file__))
        # rsync splits this at spaces, and understands quotes.
        shell = shlex.join([python, "-I", "-S", relay, str(theirs.fileno())])
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        program = os.path.abspath(shutil.which(command) or command)
        argv = [python, "-I", "-S", str(Path(enclosure.__file__)), source]
        argv += [*_needed(python), relay, program, "--", program, command]
        argv += [*ALWAYS, *words, f"--rsh={shell}", "--", f"{enclosure.TREE}/", "pyploop::tree/"]
        try:
            self._process = subprocess.Popen(
                argv,
                # A daemon may make rsync ask for a password, which it reads from stdin.
                stdin=subprocess.PIPE if FED in words else subprocess.DEVNULL,
                stdout=self.items.fd,
                stderr=self._errors.fd,
                env=_environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError as e:
            self.close()
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"cannot run {command} on this host: {e.strerror}",
                path=command,
            ) from e
        finally:
            theirs.close()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._errors.started()
        self.items.started()

    def wait_ready(self) -> None:
        """Wait until only the channel is missing.  MigrateError when rsync has ended before, or
        is late."""
        self._control.settimeout(deadlines.RSYNC_READY)
        try:
            if self._control.recv(1):
                return
            why = self.wait().errors
        except OSError as e:
            why = str(e)
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"the rsync of {self._source} does not start its remote shell: {why}",
            path=self._source,
        )

    def connect(self, channel: int) -> None:
        """Let the pass begin.  The caller still closes the channel's descriptor."""
        try:
            socket.send_fds(self._control, [b"."], [channel])
        except OSError as e:
            raise WriteError.of(
                f"cannot connect the rsync of {self._source} to the target", e, path=self._source
            ) from e

    def feed(self, names: Iterable[bytes]) -> None:
        """Name the files of a COMPARED or PARTED pass.  rsync reads them when it is connected."""
        assert self._process is not None and self._process.stdin is not None
        stdin = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its exit status says why
            # With ./ a name that begins with # or ; is not taken for a comment.
            stdin.write(b"".join(b"./" + name + b"\0" for name in names))
            stdin.close()

    def wait(self, connected: Callable[[], bool] = lambda: True) -> Done:
        """Wait until rsync has ended, successfully or not.  It ends by itself when the peer
        is silent.  When the connection has ended (`connected`), it is soon killed."""
        assert self._process is not None
        look = deadlines.RSYNC_SOONEST
        while not descriptors.readable(self._pidfd, look):
            look = min(2 * look, deadlines.RSYNC_LOOK)
            if not connected() and not descriptors.readable(self._pidfd, deadlines.RSYNC_ENDING):
                self.kill()
            if self._skip_fifo():
                look = deadlines.RSYNC_SOONEST  # there may be more of them
        status = self._process.wait()
        # When the server refuses something, rsync prints that on stdout.
        text = self._errors.text(ended=True)[-2000:] or self.items.text(ended=True)[-2000:]
        # Show the tree's own path, and not the one in rsync's enclosure.
        errors = last_words(text).replace(f'"{enclosure.TREE}/', f'"{self._source}/')
        self.items.wait()
        return Done(status, errors, self.items)

    def _skip_fifo(self) -> bool:
        """A container may replace a file that rsync has listed by a FIFO.  rsync's open(2)
        would then wait forever, while keep-alives go to and fro.  A signal that rsync
        handles anyway ends the wait, and it goes on without the file.  Returns whether the
        signal was sent."""
        assert self._process is not None
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{self._process.pid}/wchan").read_text() in _OPENS_FIFO:
                signal.pidfd_send_signal(self._pidfd, signal.SIGCHLD)
                return True
        return False

    def kill(self) -> None:
        """From any thread."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End rsync at any point, and wait for it."""
        self.kill()
        self._control.close()
        if self._process is not None:
            self._process.wait()
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
            if self._process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
        self._errors.close()
        self.items.close()


def _interpreter() -> str:
    """Python's own program, and not a virtual environment's link to it."""
    return str(getattr(sys, "_base_executable", "") or sys.executable)


_SHOWN = (
    *("/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/bin", "/usr/local/lib"),
    *("/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache"),
)


def _needed(python: str) -> list[str]:
    """What programs need to read of the host, outer folders first: programs, libraries
    and Python's modules.  There are no secrets in them."""
    modules = {os.path.realpath(sysconfig.get_path(k)) for k in ("stdlib", "platstdlib")}
    own = sorted(os.path.dirname(path) for path in modules)
    return [*_SHOWN, *own, python]


# ---- the server

LEAST_MEMORY = GIB
"""Bytes of memory that a server may have on any host.  Enough for eight million files."""
MEMORY_PART = 8
"""The server may have one part in so many of the host's memory, if that is more."""


def serve(
    command: str,
    path: str,
    fd: int,
    *,
    config: Path,
    log: LastWords,
    stall: float,
    keep_fds: Sequence[int],
) -> subprocess.Popen[bytes]:
    """Start the server of one pass.  It writes below `path` and nowhere else.

    fd: a socket to the client; the caller closes it.  config: the file for the server's
    configuration.  log: gets the server's output, which the client can make as long as it
    likes.  MigrateError(6) when the server cannot be run."""
    taken = " ".join(f"!{word}" for word in _TAKEN.split())
    output = f"/dev/fd/{log.fd}"
    config.write_text(_CONFIG.format(stall=max(1, int(stall)), log=output, path=path, taken=taken))
    try:
        process = subprocess.Popen(
            [command, "--server", "--daemon", f"--config={config}", "."],
            stdin=fd,
            stdout=fd,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            pass_fds=(*keep_fds, log.fd),
            start_new_session=True,
        )
    except OSError as e:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"cannot run {command} on this host: {e.strerror}",
            path=command,
        ) from e
    _bound(process.pid)
    log.started()
    return process


def wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a server, and return its exit status.  The server's child writes the files,
    and may outlive a killed server.  It is killed here, or it could overwrite what a later
    pass has brought."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its PID stays reserved
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _bound(pid: int) -> None:
    """Limit the server's memory: it stores a list of all files that its client names.  Called
    before it has read anything."""
    most = max(
        LEAST_MEMORY, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MEMORY_PART
    )
    with contextlib.suppress(OSError):  # it has ended
        resource.prlimit(pid, resource.RLIMIT_DATA, (most, most))
        # If that is still too much, the kernel kills it before any other process.
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def last_errors(log: str) -> str:
    """The errors at the end of a server's log, without their times."""
    lines = log[-2000:].splitlines()
    errors = [_STAMP.sub("", line) for line in lines if "rsync: " in line or "rsync error" in line]
    return last_words("\n".join(errors))


_STAMP = re.compile(r"^\S+ \S+ \[\d+\] ")
