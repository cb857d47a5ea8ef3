# SPDX-License-Identifier: Apache-2.0
"""ptrace(2), as far as the guard of a lazy restore needs it: a process that is traced stops at
its end, SIGKILL included, before its descriptors are closed (lazy_guard.py)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time

SEIZE, LISTEN, CONT, _GETEVENTMSG = 0x4206, 0x4208, 7, 0x4201
EVENT_EXIT, EVENT_STOP, TRACE_EXIT, WALL = 6, 128, 0x40, 0x40000000
"""linux/ptrace.h: PTRACE_EVENT_EXIT, _STOP, PTRACE_O_TRACEEXIT; linux/wait.h: __WALL."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, data: int = 0) -> None:
    """OSError."""
    if _libc.ptrace(request, pid, None, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def end_of(pid: int) -> int:
    """The wait status of a process that has stopped at its end.  OSError."""
    message = ctypes.c_ulong()
    ptrace(_GETEVENTMSG, pid, ctypes.addressof(message))
    return message.value & 0xFFFF


def words_of(status: int) -> str:
    """How a process has ended: '' for well."""
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    return f"it ended with {code}" if code else ""


def can_trace() -> str:
    """Why a process cannot be traced here to its end; '' when it can."""
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        ptrace(SEIZE, child, TRACE_EXIT)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, WALL)
        if status >> 16 != EVENT_EXIT:
            return "this kernel does not stop a traced process at its end"
        ptrace(CONT, child)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGKILL)
        return f"a process cannot be traced: {e.strerror}"
    finally:
        with contextlib.suppress(ChildProcessError):
            while not os.WIFSIGNALED(os.waitpid(child, WALL)[1]):
                pass
    return ""
