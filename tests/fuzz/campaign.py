#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fuzz a C parser of what the peer says: build its harness with clang, start from
the corpus of the tree, run for a while, and say how it went.

    tests/fuzz/campaign.py {recv|reply|files} [--seconds N] [--jobs N] [--folder DIR] [--save]

--folder keeps what was found for a later run, which goes on from there.
--save minimises what was found interesting and writes it to the tree's corpus.
Exit code 1 when there is a finding; its input is left in the folder named.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compiled import Compiler

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
PRODUCT = {
    "recv": (
        *("recv", "recv_ring", "recv_head", "recv_unpack", "recv_out", "recv_fill", "recv_place"),
        *("recv_lanes", "direct", "ahead", "proof", "bitmap", "hash", "hash_avx2"),
    ),
    "reply": ("pump_reply", "patience"),
    "files": ("files_in", "patience"),
}
"""Harness -> the sources of csrc/ in it; the harness stands in for what these call."""
COMMON = ["-g", "-O1", "-std=gnu11", "-Wall", "-Wextra", "-pthread"]
COMMON += ["-DPL_HUGE_SHIFT=18u", "-DMIN_RUN=32768u", "-DPL_FRAME_MOST=32u"]
"""Huge pages that a small stream fills, and a ring that it goes around."""
SANITIZE = "address,undefined"
MAX_LEN = 400
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}


def corpus_of(name: str) -> Path:
    return HERE / f"{name}.corpus"


def build(name: str, compiler: Compiler, csrc: Path, sanitize: str, *more: str) -> Path:
    """The harness around its sources."""
    flags = [*COMMON, "-I.", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", *more]
    seams = [*flags, "-include", str(HERE / "seams.h")]
    objects = compiler.objects(csrc, [f"{part}.c" for part in PRODUCT[name]], seams)
    objects += compiler.objects(csrc, [str(HERE / f"fuzz_{name}.c")], flags)
    return compiler.program(objects, flags)


def build_replay(name: str, compiler: Compiler, csrc: Path = CSRC) -> Path:
    """The harness that reads a corpus from stdin; needs no libFuzzer."""
    return build(name, compiler, csrc, SANITIZE, "-DREPLAY")


def unpack(packed: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number, line in enumerate(packed.read_text().split()):
        (folder / f"{number:05}").write_bytes(bytes.fromhex(line))


def pack(folder: Path, packed: Path) -> int:
    inputs = sorted((p.read_bytes() for p in folder.iterdir()), key=lambda b: (len(b), b))
    packed.write_text("".join(f"{data.hex()}\n" for data in inputs))
    return len(inputs)


def fuzz(program: Path, corpus: Path, seconds: int) -> subprocess.Popen[str]:
    command = [
        "nice", "-n", "19", str(program), str(corpus), f"-max_len={MAX_LEN}",
        f"-max_total_time={seconds}", "-timeout=5", "-print_final_stats=1", "-reload=1",
        f"-artifact_prefix={corpus.parent}/finding-",
    ]  # fmt: skip
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz a C parser.")
    parser.add_argument("name", choices=tuple(PRODUCT))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="work here (a temporary folder)")
    parser.add_argument("--save", action="store_true", help="write the minimised corpus back")
    o = parser.parse_args()
    folder = o.folder or Path(tempfile.mkdtemp(prefix="pyploop-fuzz-"))
    folder.mkdir(exist_ok=True)
    objects = folder / "objects"
    objects.mkdir(exist_ok=True)
    program = build(o.name, Compiler(objects, "clang"), CSRC, f"fuzzer,{SANITIZE}", "-O2")
    corpus = folder / "corpus"
    unpack(corpus_of(o.name), corpus)
    jobs = [fuzz(program, corpus, o.seconds) for _ in range(o.jobs)]
    executed, found = 0, False
    for job in jobs:
        _, text = job.communicate()
        units = re.findall(r"number_of_executed_units: (\d+)", text)
        executed += int(units[-1]) if units else 0
        if job.returncode:
            found = True
            print(text[-3000:])
        for line in re.findall(r"#\d+\s+DONE.*", text):
            print(line)
    print(
        f"{executed} executions, {len(list(corpus.iterdir()))} inputs, finding: {found}; {folder}"
    )
    if o.save and not found:
        small = folder / "small"
        small.mkdir()
        merge = [str(program), "-set_cover_merge=1", str(small), str(corpus)]
        subprocess.run(merge, env=ENVIRONMENT, check=True, capture_output=True)
        packed = corpus_of(o.name)
        print(f"{pack(small, packed)} inputs saved to {packed}")
    return found


if __name__ == "__main__":
    sys.exit(main())
