# SPDX-License-Identifier: Apache-2.0
"""csrc/ under sanitizers: each tests/native/test_*.c is a program of its own."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import support

SOURCES = sorted((support.ROOT / "csrc").glob("*.c"))
NATIVE = support.ROOT / "tests" / "native"
SANITIZERS = {
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
SKIPPED = 77
NATIVE_TEST = "test_native_code_is_right_and_clean_under_sanitizers"


def _flags(kind: str) -> list[str]:
    return [
        "-std=gnu11", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-fno-omit-frame-pointer",
        *SANITIZERS[kind], f"-I{support.ROOT / 'csrc'}", f"-I{NATIVE}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """csrc/ compiled once for each sanitizer."""
    support.needs("cc")
    result: dict[str, Path] = {}
    jobs: list[subprocess.Popen[bytes]] = []
    for kind in SANITIZERS:
        folder = result[kind] = tmp_path_factory.mktemp(kind)
        jobs += [
            subprocess.Popen(
                ["cc", *_flags(kind), "-Werror", "-c", str(c), "-o", str(folder / f"{c.stem}.o")]
            )
            for c in SOURCES
        ]
    assert [j.wait() for j in jobs] == [0] * len(jobs)
    return result


def _run(name: str, kind: str, folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    program = folder / f"{name}-{kind}"
    objects = sorted(folder.glob("*.o"))
    support.run("cc", *_flags(kind), NATIVE / f"{name}.c", *objects, "-o", program)
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
    ("test_pump", "asan"),
    ("test_pump", "tsan"),
    ("test_pump_d2", "asan"),
    ("test_pump_d2", "tsan"),
    ("test_recv", "asan"),
    ("test_recv", "tsan"),
    ("test_huge", "asan"),
    ("test_huge", "tsan"),
    ("test_recv_d2", "asan"),
    ("test_recv_d2", "tsan"),
]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, library: dict[str, Path]
) -> dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]]:
    """The programs that are asked for, built and run side by side, and ended."""
    wanted = [
        (str(item.callspec.params["name"]), str(item.callspec.params["kind"]))
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == NATIVE_TEST
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {(n, k): pool.submit(_run, n, k, library[k], 240) for n, k in wanted}


@pytest.mark.parametrize(("name", "kind"), PROGRAMS)
def test_native_code_is_right_and_clean_under_sanitizers(
    runs: dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]], name: str, kind: str
) -> None:
    done = runs[name, kind].result()
    if "unexpected memory mapping" in done.stderr:
        support.missing(f"ThreadSanitizer cannot run here: {done.stderr.strip()[:200]}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.root
def test_bpf_tracker_is_right_against_real_devices(library: dict[str, Path]) -> None:
    support.needs("root")
    done = _run("test_bpf", "asan", library["asan"], 100)
    if done.returncode == SKIPPED:
        support.missing(done.stdout.strip() or "test_bpf skipped")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
