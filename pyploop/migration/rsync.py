# SPDX-License-Identifier: Apache-2.0
"""rsync(1) as a migration uses it: its client here, its server at the agent.

The server is rsync's own daemon on a channel instead of a port.  Its one
module, its chroot there, and the options that it takes are in a configuration
that the agent writes; so the peer can name no other place, read nothing, and
run nothing.
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
"""The first whose daemon can refuse all options but some."""
ALWAYS = (
    # The second X: with what a backup's rsync --fake-super has written (user.rsync.%stat).
    "-aHAXXSx",
    "--numeric-ids",
    # Times to the nanosecond: a change within the same second is seen.
    "--modify-window=-1",
    "--out-format=%i %n",
)
TREE = ("--delete",)
"""Of a pass over all of it."""
CHANGING = ("--no-inc-recursive",)
"""Of one over a tree that changes meanwhile.  With hard links in it, an rsync that
lists it bit by bit (3.5.0) may wait endlessly for a name that has moved away."""
FED = "--files-from=-"
_LISTED = (FED, "--from0", "--ignore-missing-args")
COMPARED = (*_LISTED, "--checksum")
"""Of one over files by name, compared by what they hold.  What is gone meanwhile
is the next pass's."""
PARTED = (*_LISTED, "--ignore-times")
"""The same, where files at the target have several names: each becomes a file of its
own again, with the names that it has here.  A name that was one of another file's, and
got the same contents, would stay that."""
VANISHED, PARTIAL = 24, 23
_OPENS_FIFO = ("wait_for_partner", "fifo_open")
"""The kernel's function in which open(2) waits for a FIFO's other end."""

_TAKEN = (
    "a hard-links acls xattrs sparse one-file-system numeric-ids modify-window log-format "
    "delete delete-during relative no-r no-recursive dirs ignore-times checksum checksum-choice "
    "compress* new-compress old-compress whole-file no-whole-file block-size bwlimit timeout "
    "inplace partial"
)
"""What a client of ours sends, with the options that a user may add."""
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
    """MigrateError(6) when it is not there, or too old."""
    if shutil.which(command) is None:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{command} is not installed on this host: it copies a container's directories",
        )
    done = subprocess.run(
        [command, "--version"], capture_output=True, check=False, timeout=deadlines.RSYNC_VERSION
    )
    found = re.match(rb"rsync +version v?(\d+)\.(\d+)", done.stdout)
    if found is None:
        raise MigrateError(VzExitCode.COPY_FAILED, f"{command} is not rsync, by its --version")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise MigrateError(
            VzExitCode.COPY_FAILED,
            f"{command} is {found[0].decode()} on this host: 3.2 or newer is needed",
        )


def _environment() -> dict[str, str]:
    """Without what changes rsync's ways, and its messages in English."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RSYNC_")}
    return kept | {"LC_ALL": "C"}


# ---- the client


@dataclass(frozen=True)
class Done:
    """An rsync that has ended."""

    status: int
    said: str
    items: Itemized

    def explain(self, what: str) -> MigrateError:
        return MigrateError(
            VzExitCode.COPY_FAILED, f"rsync of {what} ended with {self.status}: {self.said}"
        )


class Client:
    """One pass, started, which waits until it gets a channel."""

    def __init__(self, command: str, words: Sequence[str], source: str) -> None:
        """words: options; source: the tree's path here."""
        ours, theirs = socket.socketpair()
        self._control = ours
        self._errors = LastWords()  # the server's are among them
        self.items = Itemized()
        self._source = source
        python, relay = os.path.realpath(_interpreter()), str(Path(relay_program.__file__))
        # rsync splits this at spaces, and knows quotes.
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
                # A daemon may have it ask for a password, which it reads there.
                stdin=subprocess.PIPE if FED in words else subprocess.DEVNULL,
                stdout=self.items.fd,
                stderr=self._errors.fd,
                env=_environment(),
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError as e:
            self.close()
            raise MigrateError(VzExitCode.COPY_FAILED, f"cannot run {command}: {e.strerror}") from e
        finally:
            theirs.close()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._errors.started()
        self.items.started()

    def wait_ready(self) -> None:
        """Only the channel is missing.  MigrateError when rsync does not come so far."""
        self._control.settimeout(deadlines.RSYNC_READY)
        try:
            if self._control.recv(1):
                return
            why = self.wait().said
        except OSError as e:
            why = str(e)
        raise MigrateError(VzExitCode.COPY_FAILED, f"rsync does not start its remote shell: {why}")

    def connect(self, channel: int) -> None:
        """Go.  The channel's descriptor stays the caller's."""
        try:
            socket.send_fds(self._control, [b"."], [channel])
        except OSError as e:
            raise WriteError.of("cannot give rsync its channel", e) from e

    def feed(self, names: Iterable[bytes]) -> None:
        """The files of a COMPARED or PARTED pass, which rsync reads when it is connected."""
        assert self._process is not None and self._process.stdin is not None
        stdin = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its exit status says why
            # Before a name that begins with # or ; too: no comment.
            stdin.write(b"".join(b"./" + name + b"\0" for name in names))
            stdin.close()

    def wait(self, connected: Callable[[], bool] = lambda: True) -> Done:
        """When it has ended, however; it gives a silent peer up by itself.  Soon, when
        it is not `connected` any more."""
        assert self._process is not None
        look = deadlines.RSYNC_SOONEST
        while not descriptors.readable(self._pidfd, look):
            look = min(2 * look, deadlines.RSYNC_LOOK)
            if not connected() and not descriptors.readable(self._pidfd, deadlines.RSYNC_ENDING):
                self.kill()
            if self._skip_fifo():
                look = deadlines.RSYNC_SOONEST  # there may be more of them
        status = self._process.wait()
        # What the server refuses is not reported as an error.
        text = self._errors.text(ended=True)[-2000:] or self.items.text(ended=True)[-2000:]
        # As the tree is called outside.
        said = last_words(text).replace(f'"{enclosure.TREE}/', f'"{self._source}/')
        self.items.wait()
        return Done(status, said, self.items)

    def _skip_fifo(self) -> bool:
        """A container may put a FIFO in the place of a file that rsync has listed.  Its
        open(2) would wait endlessly, with keep-alives going to and fro.  A signal that
        rsync takes anyway ends that; it goes on without the file."""
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
        """End it, wherever it is."""
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
    """The program that runs this, and not a virtual environment's link to it."""
    return str(getattr(sys, "_base_executable", "") or sys.executable)


_SHOWN = (
    *("/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/bin", "/usr/local/lib"),
    *("/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache"),
)


def _needed(python: str) -> list[str]:
    """What programs need of the host, outer folders first: programs, libraries
    and Python's modules, which hold no secrets."""
    modules = {os.path.realpath(sysconfig.get_path(k)) for k in ("stdlib", "platstdlib")}
    own = sorted(os.path.dirname(path) for path in modules)
    return [*_SHOWN, *own, python]


# ---- the server

LEAST_MEMORY = GIB
"""Bytes that a server may have on any host: some eight million files."""
MEMORY_PART = 8
"""Or this part of the host's memory, where that is more."""


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
    """Start the server of one pass, whose client is at the socket fd (which
    stays the caller's): it writes below `path` and nowhere else.

    config: the file for its configuration.  log: what it says; the client has it
    say what it likes, as much as it likes.  MigrateError(6) when it cannot be run."""
    taken = " ".join(f"!{word}" for word in _TAKEN.split())
    said = f"/dev/fd/{log.fd}"
    config.write_text(_CONFIG.format(stall=max(1, int(stall)), log=said, path=path, taken=taken))
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
        raise MigrateError(VzExitCode.COPY_FAILED, f"cannot run {command}: {e.strerror}") from e
    _bound(process.pid)
    log.started()
    return process


def wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a server.  It has a child that writes, which may outlive it if
    it is killed, and must not: a later pass would have come before."""
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its number stays its own
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _bound(pid: int) -> None:
    """The server lists all files that its client sends.  It has read nothing yet."""
    most = max(
        LEAST_MEMORY, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MEMORY_PART
    )
    with contextlib.suppress(OSError):  # it has ended
        resource.prlimit(pid, resource.RLIMIT_DATA, (most, most))
        # The kernel ends it sooner than any other process, if that is still too much.
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def last_errors(log: str) -> str:
    """The errors at the end of a server's log, without their times."""
    lines = log[-2000:].splitlines()
    errors = [_STAMP.sub("", line) for line in lines if "rsync: " in line or "rsync error" in line]
    return last_words("\n".join(errors))


_STAMP = re.compile(r"^\S+ \S+ \[\d+\] ")
