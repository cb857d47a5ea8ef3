# SPDX-License-Identifier: Apache-2.0
"""Bytes of a hostile peer, or of a damaged file, through each Python parser."""

from __future__ import annotations

import parsers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyploop.wire import d2

EDITS = st.lists(
    st.tuples(st.integers(0, 2000), st.integers(0, 12), st.binary(max_size=12)), max_size=5
)
"""Where, how many bytes go, what comes instead."""


@pytest.mark.parametrize("name", list(parsers.TARGETS))
def test_no_bytes_surprise_the_parser(name: str) -> None:
    target = parsers.TARGETS[name]

    @settings(max_examples=400, deadline=None)
    @given(st.sampled_from(target.seeds), EDITS)
    def damaged(seed: bytes, edits: list[tuple[int, int, bytes]]) -> None:
        for at, gone, new in edits:
            at = at % (len(seed) + 1)  # noqa: PLW2901
            seed = seed[:at] + new + seed[at + gone :]
        target.run(seed)

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=300))
    def arbitrary(data: bytes) -> None:
        target.run(data)

    damaged()
    arbitrary()


def test_deep_nesting_is_no_crash() -> None:
    parsers.parse_mux(bytes(8) + b"[" * 200_000)
    parsers.parse_descriptor(b"<a>" * 100_000)
    parsers.parse_vzconf(b"A=" + b"${B" * 50_000)


def test_the_smallest_reply_of_all_has_a_meaning() -> None:
    """-2^31 is an int32, but the negative of it is no int of C's."""
    for code in (-(1 << 31), -4096, -4095, -1, 1, (1 << 31) - 1):
        assert f"(reply {code})" in d2.meaning(code)
