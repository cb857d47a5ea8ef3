# SPDX-License-Identifier: Apache-2.0
"""The migration that a shell script would do: a fresh ssh, scp or rsync per step.

    python3 naive.py HOST       (on the host that runs the container)

Prints how long each step of the suspended time took, as JSON (seconds).  It does
what it can without a tool of its own: the image is copied twice while the
container runs, the second time in place and by differences; the copy is durable
before the container is suspended; the dump is made and received in memory.
Nothing is undone when a step fails: it is a yardstick, not a product.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from lab.container import BUNDLE, IMAGE, LINK_DOWN, NAME, ROOTFS

DUMP, WORK = "/dev/shm/naive-dump", "/dev/shm/naive-work"
FLAGS = ["--tcp-established", "--file-locks"]


def do(*words: str, tries: int = 1) -> str:
    """Run one command; the restored container would keep its output open."""
    null = subprocess.DEVNULL
    quiet = "restore" in " ".join(words)
    done = subprocess.run(
        words,
        stdin=null,
        stdout=null if quiet else subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode and tries > 1:
        return do(*words, tries=tries - 1)
    if done.returncode:
        raise SystemExit(f"naive: {' '.join(words)} ended with {done.returncode}")
    return done.stdout or ""


def copy_image(host: str) -> None:
    # -I: a file that changed within one second and kept its size looks unchanged.
    do("rsync", "-aISq", "--inplace", "--no-whole-file", str(IMAGE), f"{host}:{IMAGE}")


def main() -> int:
    (host,) = sys.argv[1:]
    do("ssh", host, f"rm -rf {IMAGE} {DUMP} {WORK}; mkdir -p {WORK}")
    do("rm", "-rf", DUMP, WORK)
    do("mkdir", "-p", DUMP, WORK)
    copy_image(host)
    copy_image(host)
    do("ssh", host, f"sync -d {IMAGE}")
    steps: dict[str, float] = {}
    before = start = time.monotonic()

    def took(step: str) -> None:
        nonlocal before
        now = time.monotonic()
        steps[step] = now - before
        before = now

    do("runc", "pause", NAME, tries=5)  # "unable to freeze", on a busy machine
    do(*LINK_DOWN.split())
    do("runc", "checkpoint", "--image-path", DUMP, "--work-path", WORK, *FLAGS, NAME)
    took("suspend_dump")
    do("umount", str(ROOTFS))
    took("umount")
    copy_image(host)
    took("copy_disk")
    do("scp", "-qr", DUMP, f"{host}:{DUMP}")
    took("copy_dump")
    do("ssh", host, f"mount -o loop {IMAGE} {ROOTFS}")
    took("mount")
    restore = f"restore -d -b {BUNDLE} --image-path {DUMP} --work-path {WORK}"
    do("ssh", host, f"runc {restore} {' '.join(FLAGS)} {NAME} </dev/null >/dev/null 2>&1")
    took("restore")
    print(json.dumps({**steps, "total": before - start}))
    do("rm", "-rf", DUMP, WORK, str(IMAGE))
    do("ssh", host, f"rm -rf {DUMP} {WORK}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
