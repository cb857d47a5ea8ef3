# SPDX-License-Identifier: Apache-2.0
"""The guard of a lazy restore: it starts `criu lazy-pages`, outlives the agent, and says
how the daemon has ended (docs/internals/lazy-restore.md).

It is a program of its own (python -I -m), in a session of its own.

Invariant: no process of the container reads a zero where its memory should be.  When the
daemon dies, the kernel fills what has not come yet with zeroes, silently, as soon as the
daemon's descriptors are closed.  So the guard traces the daemon.  The kernel stops it at its
end, SIGKILL included, before its descriptors are closed.  Unless it has ended well, the guard
ends the container's processes first, and only then lets the daemon go.

argv: the descriptor of a packet socket to the agent, the path of the record.  Messages, one
JSON object a packet:

    guard: {"ready": ""}                 else the reason why it cannot guard anything
    agent: {"op": "serve", …}            start the daemon: its `argv` and `log`; `pass`:
                                         descriptors for it; `why`: a file that says why its
                                         pages do not come; `state`: runc's
                                         record of the container; `images`: the folder that is
                                         removed when all memory is there; `total`: bytes of it;
                                         `commit`: the commit record
    guard: {"serving": ""}               else the reason why the daemon does not run
    agent: {"op": "keep"}                the container runs, and the agent may end
    agent: {"op": "stop"}                it does not run: end the daemon, remove the record
    guard: {"stopped": ""}

When the socket ends without `keep`, the commit record decides.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import syslog
import time
from typing import Any

from pyploop.runtimes.runc import process_trace as trace
from pyploop.runtimes.runc.guarded_container import end_container, life_of
from pyploop.system import kernel, mount_table, removal

LONGEST = 1 << 17
"""Bytes of one message at most."""
SOCKET = "lazy-pages.socket"
"""Its name in the daemon's folder, as CRIU has it."""
READY_SECONDS = 8.0
"""For the daemon to listen."""
LONG_SECONDS = 600.0
"""Between two lines of the log about memory that is not loaded yet."""
KEPT = ("committed", "ran")
"""Words of a commit record: the container may run here."""

_STOPPING = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_POLITE = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE, signal.SIGCONT),
)
"""The daemon's end would be the container's: whoever asks for it in this way is not heard."""


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot."""
    with open(f"/proc/{pid}/stat", "rb") as f:
        return int(f.read().rpartition(b")")[2].split()[19])


def bytes_read(pid: int) -> int:
    """By the process, in all."""
    with open(f"/proc/{pid}/io") as f:
        return int(f.readline().split()[1])


class Record:
    """What is on disk about this restore, for `pyploop status` and later processes."""

    def __init__(self, path: str) -> None:
        self._path = path
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as f:
            self.fields: dict[str, Any] = json.load(f)

    def set(self, **fields: Any) -> None:
        """In one step, and durable."""
        self.fields.update(fields)
        new = self._path + ".new"
        with contextlib.suppress(FileNotFoundError):  # left by a crash
            os.unlink(new)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(new, flags, 0o600), "w") as f:
                json.dump(self.fields, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(new, self._path)
        except OSError:  # a full disk, above all
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


class Guard:
    """Of one restore."""

    def __init__(self, line: socket.socket, record: Record) -> None:
        self._line, self._record = line, record
        self._order: dict[str, Any] = {}
        self._daemon = 0
        """Its PID, until it was let go."""
        self._status: int | None = None
        """Of the daemon, from the moment on at which it ends."""
        self._stopping = False
        """Its end is wanted: nothing of the container has run."""
        self._kept = False
        """The container runs."""
        self._life: object = None
        """Of that container, as `life_of`: another one may have its name later."""
        self._why = ""
        """How the daemon has died before all memory was there."""
        self._chld, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    # ---- the agent

    def serve(self) -> None:
        """Until the daemon has ended, and it is known what becomes of the container."""
        pid = os.getpid()
        self._record.set(guard={"pid": pid, "start": start_time(pid)})
        self._say(ready=trace.can_trace())
        while not self._kept or self._daemon:
            lines: list[Any] = [self._chld] if self._kept else [self._chld, self._line]
            ready = select.select(lines, [], [], LONG_SECONDS)[0]
            if not ready:  # nothing else may be done about it: the container needs it
                log(f"{self._name()}: its memory is still not loaded", syslog.LOG_WARNING)
            if self._chld in ready:
                self._look()
            if self._line in ready and not self._kept and not self._hear():
                return
        self._finish()

    def _say(self, **words: str) -> None:
        with contextlib.suppress(OSError):
            self._line.send(json.dumps(words).encode())

    def _hear(self) -> bool:
        """One message; False when there is nothing left to guard."""
        try:
            data = self._line.recv(LONGEST)
        except ConnectionResetError:
            return True  # it ended with an answer unread; its own messages come next
        message = json.loads(data) if data else {"op": "keep" if self._committed() else "stop"}
        if message["op"] == "serve":
            self._order = message
            self._say(serving=self._start())
        elif message["op"] == "keep":
            self._keep()
        else:
            self._stop()
            self._say(stopped="")
            return False
        return True

    def _committed(self) -> bool:
        """The agent has ended without a word: whether the container may run here."""
        if not self._daemon and self._status is None:
            return False
        with contextlib.suppress(OSError, KeyError), open(self._order["commit"]) as f:
            return f.read(16).strip() in KEPT
        return False

    def _keep(self) -> None:
        self._kept = True
        self._life = life_of(self._order["state"])
        if self._why:
            self._lost()
            return
        self._note(state="loading", since=time.time())
        log(f"{self._name()}: its memory is loaded while it runs, by process {self._daemon}")

    def _stop(self) -> None:
        self._end_daemon()
        self._record.remove()

    # ---- the daemon

    def _start(self) -> str:
        """Why it does not listen; '' when it does."""
        told, tell = os.pipe2(os.O_CLOEXEC)
        # Blocked, they wait until its end.  CRIU takes an interrupted wait for an error.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _POLITE)
        try:
            daemon = subprocess.Popen(
                [*self._order["argv"], "--status-fd", str(tell)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[tell, *self._order.get("pass", ())],
                start_new_session=True,
            )
        except OSError as e:
            os.close(told)
            return f"{self._order['argv'][0]}: {e.strerror}"
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for fd in (tell, *self._order.get("pass", ())):
                os.close(fd)
        daemon.returncode = 0  # waited for here, and not by subprocess
        self._daemon = daemon.pid
        try:
            trace.ptrace(trace.SEIZE, daemon.pid, trace.TRACE_EXIT)
            known = {"pid": daemon.pid, "start": start_time(daemon.pid)}
            self._record.set(daemon=known)
            spare(daemon.pid)
            if "pass" in self._order:  # post-copy (page_stream.hurry)
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, daemon.pid, -10)
            if not self._listens(told):
                why = f"criu lazy-pages does not listen ({self._said() or 'it said nothing'})"
            elif not holds_socket(daemon.pid):
                why = f"{self._order['argv'][0]} is a script around CRIU that does not `exec` it"
            else:
                self._record.set(read=bytes_read(daemon.pid), total=self._order.get("total", 0))
                return ""
        except OSError as e:
            why = f"criu lazy-pages: {e.strerror}"
        finally:
            os.close(told)
        self._end_daemon()
        return why

    def _listens(self, told: int) -> bool:
        """Wait for the daemon's word; what it does is handled meanwhile, for it stops at each
        signal."""
        deadline = time.monotonic() + READY_SECONDS
        while self._daemon and (left := deadline - time.monotonic()) > 0:
            if told in select.select([told, self._chld], [], [], left)[0]:
                return bool(os.read(told, 1))
            self._look()
        return False

    def _end_daemon(self) -> None:
        """Nothing of the container has run."""
        self._stopping = True
        deadline = time.monotonic() + READY_SECONDS
        with contextlib.suppress(ProcessLookupError):
            if self._daemon:
                os.kill(self._daemon, signal.SIGKILL)
        while self._daemon and time.monotonic() < deadline:
            self._look()
            time.sleep(0.002)

    def _look(self) -> None:
        """Handle what has become of the daemon, without waiting."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._chld, 4096)
        while self._daemon:
            pid, status = os.waitpid(self._daemon, trace.WALL | os.WNOHANG)
            if not pid:
                return
            if not os.WIFSTOPPED(status):
                self._status = status if self._status is None else self._status
                self._daemon = 0
                return
            event, stopped = status >> 16, os.WSTOPSIG(status)
            with contextlib.suppress(ProcessLookupError):  # killed since
                if event == trace.EVENT_EXIT:
                    self._at_its_end()
                    trace.ptrace(trace.CONT, pid)
                elif event == trace.EVENT_STOP:
                    trace.ptrace(trace.LISTEN if stopped in _STOPPING else trace.CONT, pid)
                else:
                    trace.ptrace(trace.CONT, pid, stopped)

    def _at_its_end(self) -> None:
        """It still holds the container's memory; what it has not filled in by now is lost."""
        self._status = trace.end_of(self._daemon)
        why = trace.words_of(self._status)
        if not why or self._stopping or self._is_over():
            return
        said = self._said()
        self._why = f"criu lazy-pages: {why}" + (f" ({said})" if said else "")
        while not end_container(self._order["state"]):
            self._note(state="lost", why=f"{self._why}; its processes do not end")
            log(f"{self._name()} is lost, and its processes do not end", syslog.LOG_ERR)
        if self._kept:
            self._lost()

    def _is_over(self) -> bool:
        """The container that ran has been removed: what has its name now is another one."""
        return self._life is not None and life_of(self._order["state"]) != self._life

    def _lost(self) -> None:
        self._note(state="lost", why=self._why, ended=time.time())
        log(
            f"{self._name()} is lost: {self._why}, while its memory was being loaded. Its "
            "processes were ended; start it again from its disk",
            syslog.LOG_ERR,
        )

    def _said(self) -> str:
        """Why the pages do not come any more, or the last error in the daemon's log."""
        with contextlib.suppress(OSError), open(self._order.get("why", "")) as f:
            return f.read(200)
        try:
            with open(self._order["log"], errors="replace") as f:
                lines = [x.split(") ", 1)[-1].strip() for x in f if "Error" in x]
        except OSError:
            return ""
        return "; ".join(lines)[-200:]

    def _name(self) -> str:
        return f"container {self._record.fields['container']}"

    def _note(self, **fields: Any) -> None:
        """A full disk costs the record, and not what comes next."""
        with contextlib.suppress(OSError):
            self._record.set(**fields)

    def _finish(self) -> None:
        """All memory is there, or what is left of it is lost and said."""
        if self._why:
            return
        remove(self._order["images"])
        now = time.time()
        seconds = now - self._record.fields.get("since", now)
        self._note(state="complete", ended=now)
        log(f"{self._name()}: all of its memory is loaded, after {seconds:.1f} s")


def remove(folder: str) -> None:
    """A CRIU that was killed leaves the cgroup hierarchies mounted there, of all containers."""
    try:
        for point in mount_table.mount_points_below(folder):
            kernel.umount(point, lazy=True)
        removal.remove_tree(folder)
    except OSError as e:
        log(f"{folder} is not removed: {e.strerror}", syslog.LOG_WARNING)


def holds_socket(pid: int) -> bool:
    """Whether it is this very process that listens, and will hold the container's memory."""
    with open(f"/proc/{pid}/net/unix") as f:
        lines = [words for line in f if (words := line.split())[-1] == SOCKET]
    mine = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            mine.add(os.readlink(entry.path))
    return any(f"socket:[{words[-2]}]" in mine for words in lines)


def spare(pid: int) -> None:
    """Of those that end when memory runs out."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as f:
        f.write("-1000")


def leave_session(root: str = "/sys/fs/cgroup") -> None:
    """Out of the cgroup of the ssh session: with KillUserProcesses systemd ends all that is
    in it when the agent has ended."""
    for hierarchy in ("", "/unified", "/systemd"):
        with contextlib.suppress(OSError), open(f"{root}{hierarchy}/cgroup.procs", "r+") as f:
            f.write(str(os.getpid()))


def log(text: str, level: int = syslog.LOG_INFO) -> None:
    syslog.syslog(level, text)


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGPIPE", "SIGCHLD"):
        # Not SIG_IGN: the commands it runs would inherit that.
        signal.signal(getattr(signal, name), lambda *_: None)
    syslog.openlog("pyploop-lazy", syslog.LOG_PID, syslog.LOG_DAEMON)
    spare(os.getpid())
    leave_session()
    line = socket.socket(fileno=int(sys.argv[1]))
    Guard(line, Record(sys.argv[2])).serve()


if __name__ == "__main__":
    main()
