# SPDX-License-Identifier: Apache-2.0
"""What Podman runs in the place of conmon, and conmon in the place of runc, while a container
is restored (restored.py).  Each becomes the real program, with other words:

    interpose.py FOLDER conmon WORD…    conmon's: its runtime is FOLDER/runc
    interpose.py FOLDER runc WORD…      runc's: images, CRIU and options are pyploop's

FOLDER has `order.json`:

    conmon, runc   the real programs
    close          descriptors that conmon must not keep: locks of the migration
    images, work   folders, instead of those that Podman names; `images` may be missing: then
                   the restore fails, and Podman has only made the container
    options        further options of `runc restore`
    environment    for runc and CRIU

and `criu`, the path of what runc runs as CRIU.  Started by its path (python -I -S); it imports
only the standard library.
"""

import contextlib
import json
import os
import sys
from typing import Any


def conmon(folder: str, order: dict[str, Any], words: list[str]) -> None:
    for fd in order["close"]:
        with contextlib.suppress(OSError):
            os.close(fd)
    if "-r" in words:
        words[words.index("-r") + 1] = f"{folder}/runc"
    os.execv(order["conmon"], [order["conmon"], *words])


def runc(folder: str, order: dict[str, Any], words: list[str]) -> None:
    if "restore" not in words:
        os.execv(order["runc"], [order["runc"], *words])
    if not order.get("images"):
        raise SystemExit("pyploop: the container was made, and is not restored")
    words[words.index("--image-path") + 1] = order["images"]
    words[words.index("--work-path") + 1] = order["work"]
    at = words.index("restore") + 1
    words[at:at] = order["options"]
    with open(f"{folder}/criu") as f:
        criu = f.read()
    argv = [order["runc"], "--criu", criu, *words]
    os.execve(argv[0], argv, {**os.environ, **order["environment"]})


def main() -> None:
    folder, what, *words = sys.argv[1:]
    with open(f"{folder}/order.json") as f:
        order = json.load(f)
    {"conmon": conmon, "runc": runc}[what](folder, order, words)


if __name__ == "__main__":
    main()
