# SPDX-License-Identifier: Apache-2.0
"""compare.py TRUTH OFFSET SIZE TARGET [--direct]: exit 1 when SIZE bytes of
TRUTH at OFFSET are not all that TARGET holds.  The differing 4 KiB blocks go to
TARGET.diff.  --direct: read TRUTH with O_DIRECT, as a device must be."""

from __future__ import annotations

import mmap
import os
import sys

CHUNK = 1 << 20
BLOCK = 4096


def main() -> int:
    truth, offset, size, target = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    direct = sys.argv[5:] == ["--direct"]
    # From a multiple of a block on, as O_DIRECT wants it.
    lead = offset % BLOCK if direct else 0
    differing: list[int] = []
    a = os.open(truth, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    b = os.open(target, os.O_RDONLY)
    wrong = "" if os.fstat(b).st_size == size else f"size {os.fstat(b).st_size}, not {size}\n"
    buf = mmap.mmap(-1, CHUNK + BLOCK)
    view = memoryview(buf)
    at = 0
    while at < size:
        got = os.preadv(a, [view[: CHUNK + (BLOCK if lead else 0)]], offset - lead + at)
        want = min(CHUNK, size - at)
        ours = view[lead : lead + want]
        theirs = os.pread(b, want, at)
        if got < lead + want:
            wrong += f"{truth} ends within {want} bytes at {at}\n"
            break
        if ours != theirs:
            for k in range(0, want, BLOCK):
                if ours[k : k + BLOCK] != theirs[k : k + BLOCK]:
                    differing.append(at + k)
        at += want
    if differing:
        wrong += f"{len(differing)} blocks differ, first {differing[:16]}\n"
    if wrong:
        with open(target + ".diff", "a") as f:
            f.write(wrong)
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
