# SPDX-License-Identifier: Apache-2.0
"""Run a command in which bpf(2) fails: forbid_bpf.py ERRNO COMMAND WORD...

COMMAND: the number of a bpf command (enum bpf_cmd), or `all`.  A seccomp filter,
as container engines have one; the machine's own kernel answers all else."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

SYS_BPF = {"x86_64": 321, "aarch64": 280}
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000


def instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def main() -> None:
    code, command, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    # struct seccomp_data: nr at 0, the low half of args[0] at 16.
    program = [instruction(LOAD, 0), instruction(EQUAL, SYS_BPF[platform.machine()], 0, 3)]
    if command == "all":
        program += [instruction(RETURN, ERRNO | code)] * 2
    else:
        program += [instruction(LOAD, 16), instruction(EQUAL, int(command), 0, 1)]
    program += [instruction(RETURN, ERRNO | code), instruction(RETURN, ALLOW)]
    text = ctypes.create_string_buffer(b"".join(program))
    filter_ = struct.pack("@HP", len(program), ctypes.addressof(text))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, FILTER, ctypes.c_char_p(filter_), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "prctl")
    os.execvp(words[0], words)


if __name__ == "__main__":
    main()
