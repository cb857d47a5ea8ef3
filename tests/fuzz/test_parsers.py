# SPDX-License-Identifier: Apache-2.0
"""Bytes of a hostile peer, or of a damaged file, through each Python parser."""

from __future__ import annotations

import parsers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
