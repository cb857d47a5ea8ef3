# SPDX-License-Identifier: Apache-2.0
"""csrc/ under sanitizers: each tests/native/test_*.c is a program of its own."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import support
from compiled import CPUS, Compiler

CSRC = support.ROOT / "csrc"
NATIVE = support.ROOT / "tests" / "native"
SOURCES = sorted(p.name for p in CSRC.glob("*.c"))
WITHOUT_THREADS = ("bpf_", "btf", "ploop")
SANITIZERS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
SKIPPED = 77
NATIVE_TEST = "test_native_code_is_right_and_clean_under_sanitizers"


def _flags(kind: str) -> list[str]:
    return [
        "-std=gnu11", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror",
        "-fno-omit-frame-pointer", *SANITIZERS[kind], f"-I{CSRC}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compiler(build_cache: Path) -> Compiler:
    support.needs("cc")
    return Compiler(build_cache)


@pytest.fixture(scope="module")
def library(compiler: Compiler) -> dict[str, list[Path]]:
    """The objects of csrc/, by sanitizer."""
    threaded = [s for s in SOURCES if not s.startswith(WITHOUT_THREADS)]
    return {
        "asan": compiler.objects(CSRC, SOURCES, _flags("asan")),
        "tsan": compiler.objects(CSRC, threaded, _flags("tsan")),
    }


def _run(
    name: str, kind: str, compiler: Compiler, library: dict[str, list[Path]], timeout: float
) -> subprocess.CompletedProcess[str]:
    objects = compiler.objects(NATIVE, [f"{name}.c"], _flags(kind))
    program = compiler.program(objects + library[kind], _flags(kind))
    env = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    }
    # TSan of gcc 12 cannot place its shadow with 32 bits of mmap randomness.
    prefix = ["setarch", "--addr-no-randomize"] if kind == "tsan" else []
    command = [*prefix, str(program)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


PROGRAMS = [
    ("test_bitmap", "asan"),
    ("test_hash", "asan"),
    ("test_proof", "asan"),
    ("test_proof", "tsan"),
    ("test_prior", "asan"),
    ("test_prior", "tsan"),
    ("test_pump", "asan"),
    ("test_pump", "tsan"),
    ("test_pump_d2", "asan"),
    ("test_pump_d2", "tsan"),
    ("test_recv", "asan"),
    ("test_recv", "tsan"),
    ("test_lanes", "asan"),
    ("test_lanes", "tsan"),
    ("test_huge", "asan"),
    ("test_huge", "tsan"),
    ("test_direct", "asan"),
    ("test_direct", "tsan"),
    ("test_recv_d2", "asan"),
    ("test_recv_d2", "tsan"),
    ("test_compress", "asan"),
    ("test_compress", "tsan"),
    ("test_files", "asan"),
    ("test_files", "tsan"),
    ("test_bundle", "asan"),
    ("test_bundle", "tsan"),
]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, compiler: Compiler, library: dict[str, list[Path]]
) -> dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]]:
    """The programs that are asked for, built and run side by side, and ended."""
    wanted = [
        (str(item.callspec.params["name"]), str(item.callspec.params["kind"]))
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == NATIVE_TEST
    ]
    with ThreadPoolExecutor(CPUS) as pool:
        return {(n, k): pool.submit(_run, n, k, compiler, library, 240) for n, k in wanted}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), PROGRAMS)
@pytest.mark.invariant(number=1)
def test_native_code_is_right_and_clean_under_sanitizers(
    runs: dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]], name: str, kind: str
) -> None:
    done = runs[name, kind].result()
    if "unexpected memory mapping" in done.stderr:
        support.missing(f"ThreadSanitizer cannot run here: {done.stderr.strip()[:200]}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.root
def test_bpf_tracker_is_right_against_real_devices(
    compiler: Compiler, library: dict[str, list[Path]]
) -> None:
    support.needs("root")
    done = _run("test_bpf", "asan", compiler, library, 100)
    if done.returncode == SKIPPED:
        support.missing(done.stdout.strip() or "test_bpf skipped")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
