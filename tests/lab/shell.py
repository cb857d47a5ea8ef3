# SPDX-License-Identifier: Apache-2.0
"""A shell on host a of a fresh lab, its container running and in use.

    python3 tests/lab/shell.py [COMMAND…]

Host b is `ssh b`; what the client saw is told at the end.  Then all is removed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lab import container, hosts, verify


def main() -> int:
    with hosts.lab() as lab, container.container(lab), verify.client(lab) as client:
        print(f"container {container.NAME}: {container.BUNDLE} on both hosts", flush=True)
        command = sys.argv[1:] or [os.environ.get("SHELL", "/bin/sh")]
        code = subprocess.run(lab.a.command(*command), check=False).returncode
        print(f"the client since its start: {client.mark()}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
