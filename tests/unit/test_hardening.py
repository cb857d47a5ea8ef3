# SPDX-License-Identifier: Apache-2.0
"""The built modules have what setup.py asks the compiler and the linker for."""

from __future__ import annotations

import platform
import re
from importlib.util import find_spec

import pytest
from support import needs, run


@pytest.fixture(params=["pyploop._core", "pyploop._kernel"])
def module(request: pytest.FixtureRequest) -> str:
    """The file of a built module."""
    needs("readelf", "objdump")
    found = find_spec(request.param)
    assert found is not None and found.origin is not None
    return found.origin


def test_symbols_are_bound_at_once_and_read_only_then(module: str) -> None:
    assert re.search(r"\(FLAGS\)\s+.*BIND_NOW", run("readelf", "-dW", module))
    segments = run("readelf", "-lW", module)
    assert "GNU_RELRO" in segments
    (stack,) = (line for line in segments.splitlines() if "GNU_STACK" in line)
    assert stack.split()[-2] == "RW"
    assert not [x for x in segments.splitlines() if "LOAD" in x and " RWE " in x]
    assert "TEXTREL" not in run("readelf", "-dW", module)


def test_the_stack_and_known_sizes_are_guarded(module: str) -> None:
    symbols = run("readelf", "-W", "--dyn-syms", module)
    assert "__stack_chk_fail" in symbols
    assert "__assert_fail" not in symbols  # assertions are for tests
    if "_core" in module:  # the other one fills no buffer of its own
        assert {"__memcpy_chk", "__read_chk"} <= set(re.findall(r"__\w+_chk", symbols))


def test_large_stack_frames_are_probed_page_by_page() -> None:
    """So that none can step over the guard page (-fstack-clash-protection)."""
    needs("objdump")
    if platform.machine() != "x86_64":
        pytest.skip("the probe is another instruction on this machine")
    found = find_spec("pyploop._core")
    assert found is not None
    assert re.search(r"\bor[ql]\s+\$0x0,", run("objdump", "-d", "--no-show-raw-insn", found.origin))


def test_calls_lead_to_marked_places_alone(module: str) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the mark is another one on this machine")
    name = "PyInit__core" if "_core" in module else "PyInit__kernel"
    code = run("objdump", "-d", "--no-show-raw-insn", f"--disassemble={name}", module)
    body = code.partition(f"<{name}>:")[2]
    assert body.split("\n")[1].split()[-1] == "endbr64"
