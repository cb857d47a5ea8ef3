# SPDX-License-Identifier: Apache-2.0
"""What the fuzzing campaign found interesting, replayed (docs/internals/testing.md)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import campaign
import pytest
import support
from compiled import Compiler

FAULTS = Path(campaign.__file__).with_name("faults.corpus")
"""Inputs that a receiver with a fault in it was found by."""
CORPORA = {
    "recv": (campaign.corpus_of("recv"), FAULTS),
    "reply": (campaign.corpus_of("reply"),),
    "files": (campaign.corpus_of("files"),),
}


@pytest.fixture(scope="module")
def compiler(build_cache: Path) -> Compiler:
    support.needs("cc")
    return Compiler(build_cache)


def replay(name: str, compiler: Compiler, csrc: Path = campaign.CSRC) -> tuple[int, bytes, bytes]:
    program = campaign.build_replay(name, compiler, csrc)
    done = subprocess.run(
        [str(program)], input=b"".join(f.read_bytes() for f in CORPORA[name]),
        env=campaign.ENVIRONMENT, capture_output=True, timeout=60, check=False,
        preexec_fn=no_core,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", list(CORPORA))
@pytest.mark.invariant(number=5)
def test_the_parser_agrees_with_the_model_on_every_input(compiler: Compiler, name: str) -> None:
    code, out, err = replay(name, compiler)
    assert (code, err) == (0, b"")
    assert int(out) == sum(len(f.read_text().split()) for f in CORPORA[name]) > 9


MUTANTS = {
    "a failure that is taken for success": (
        "reply", "pump_reply.c", "if (p->reply.value)", "if (p->reply.value > 0)"
    ),
    "zeroes over data that are not written": (
        "recv", "recv_out.c", "if (pos < data_end) {", "if (pos + 4096 < data_end) {"
    ),
    "a gap on a device that keeps what it had": (
        "recv", "recv_fill.c", "if (pos > r->covered_end) {", "if (pos > r->covered_end + 4096) {"
    ),
    "a position past 2^63 - size": (
        "recv", "recv_head.c", "(uint64_t)INT64_MAX - r->head.size", "(uint64_t)INT64_MAX"
    ),
    "a huge page over data that wait in a slot": (
        "recv", "recv_place.c", "pos < r->read_end ||", ""
    ),
    "a huge page that loses its last bytes": (
        "recv", "recv_place.c",
        "uint64_t used = (r->page_used + PL_BLOCK - 1) / PL_BLOCK * PL_BLOCK",
        "uint64_t used = r->page_used / PL_BLOCK * PL_BLOCK",
    ),
    "a part of a block that is hashed as if it were the whole": (
        "recv", "proof.c", "step == whole ?", "true ?"
    ),
    "a huge page that is not in the proof": (
        "recv", "recv_place.c", "if (r->cfg.proof)", "if (0)"
    ),
    "a proof that is older than the last data": (
        "recv", "recv.c", "if (r->head.size)\n\t\t\tr->claimed = false;", ""
    ),
    "more of a file than all may have": (
        "files", "files_in.c", "p->length <= *budget &&", "true &&"
    ),
    "data past the end that a file may have": (
        "files", "files_in.c", "p->pos <= largest - p->length);", "p->pos <= largest);"
    ),
    "a ring that begins anew with a byte in it": (
        "files", "files_in.c", "if (!f->used)", "if (f->used < 2)"
    ),
    "one file's data in another one": (
        "files", "files_in.c", "p->name_len == len && !memcmp(p->name, name, len) &&", ""
    ),
    "an answer to a packet that has none": (
        "recv", "recv.c", "r->head.type == PL_PACKET_DATA;", "true;"
    ),
}  # fmt: skip


def mutant(folder: Path, file: str, right: str, wrong: str) -> Path:
    """csrc/ with one fault in it."""
    for path in campaign.CSRC.glob("*.[ch]"):
        (folder / path.name).write_text(path.read_text())
    source = (folder / file).read_text()
    assert source.count(right) == 1
    (folder / file).write_text(source.replace(right, wrong))
    return folder


@pytest.mark.parametrize("name", support.telling(list(MUTANTS), 0, 4, 7, 10))
def test_the_replay_is_not_blind(tmp_path: Path, compiler: Compiler, name: str) -> None:
    """The product with one fault in it does not pass."""
    harness, *fault = MUTANTS[name]
    code, _, err = replay(harness, compiler, mutant(tmp_path, *fault))
    assert code and b"FINDING" in err


def test_an_assertion_stops_a_receiver_that_would_overrun_a_slot(
    tmp_path: Path, compiler: Compiler
) -> None:
    fault = ("recv.c", "left < r->cfg.slot_size - s->used - lead ?", "left ?")
    code, _, err = replay("recv", compiler, mutant(tmp_path, *fault))
    assert code and b"Assertion `part && s->used + lead + part <= r->cfg.slot_size' failed" in err


def no_core() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def test_the_harness_stands_in_for_what_it_says() -> None:
    """All of csrc/recv*.c is in it, but what it replaces."""
    sources = {p.stem for p in campaign.CSRC.glob("recv*.c")}
    assert sources - set(campaign.PRODUCT["recv"]) == {"recv_in", "recv_reply"}
    assert os.access(Path(campaign.__file__), os.X_OK)
