#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""An ssh to this host, over a line with a round trip and OpenSSH's window (bench/line.py).

    slow_ssh.py FOLDER SECONDS … -- HOST COMMAND

Each connection has a file FOLDER/PID while it is there, in the order of their beginnings.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from line import SSH_WINDOW, Line


def main() -> int:
    if "-G" in sys.argv:  # it is asked what it would do
        return 1
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    command = sys.argv[sys.argv.index("--") + 2]
    mark = folder / str(os.getpid())
    mark.touch()
    far = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert far.stdin is not None and far.stdout is not None
    with Line(seconds, 1e9, SSH_WINDOW) as line:
        line.carry(os.dup(0), os.dup(far.stdin.fileno()))
        line.carry(os.dup(far.stdout.fileno()), os.dup(1), 1)
        far.stdin.close()
        for fd in (0, 1):
            os.close(fd)
        status = far.wait()
        time.sleep(2 * seconds)  # for what is under way
    mark.unlink(missing_ok=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
