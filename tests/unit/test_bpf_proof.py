# SPDX-License-Identifier: Apache-2.0
"""What BpfTracker proves, with a made-up kernel in the place of BPF.

The kernel below keeps its own truth: which writes happened, which of their
events were lost.  A tracker may say `complete` only when all of them are among
what it handed out, or would be found by what it asked to have compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from pyploop import _core
from pyploop._core import Bitmap, Counters, Extents, Snapshot
from pyploop.disks.source import Source
from pyploop.system.sysblock import BlockDevice
from pyploop.trackers import Batch, Repair, bpf
from pyploop.undo.ledger import UndoLedger

SIZE = 1 << 20
BLOCK = 4096
SECTORS = BLOCK // 512


@dataclass
class Kernel:
    """Counters, accounting and marks; one write is one block."""

    stat: int = 1000
    done: int = 0
    queued: int = 0
    inflight: int = 0
    restless: bool = False
    done_marks: set[int] = field(default_factory=set)
    queued_marks: set[int] = field(default_factory=set)
    closed: bool = False
    queued_shift: int = 16

    def submit(self, block: int, lost: bool = False, visible: bool = True) -> None:
        """visible: counted as in flight (a request in a scheduler may not be)."""
        self.inflight += visible
        if not lost:
            self.queued += SECTORS
            self.queued_marks.add(block)

    def complete(self, block: int, lost: bool = False, visible: bool = True) -> None:
        self.inflight -= visible
        self.stat += SECTORS
        if not lost:
            self.done += SECTORS
            self.done_marks.add(block)

    def write(self, block: int, lost: bool = False, lost_submission: bool = False) -> None:
        self.submit(block, lost_submission)
        self.complete(block, lost)

    # BpfTracking

    def take_done(self, into: Bitmap) -> None:
        _mark(into, self.done_marks)

    def take_extents(self) -> Extents:
        taken = Bitmap(SIZE)
        self.take_done(taken)
        return taken.extents()

    def take_queued(self, into: Bitmap) -> None:
        assert into.shift == self.queued_shift
        _mark(into, self.queued_marks)

    def peek_done(self) -> int:
        return len(self.done_marks)

    def hook(self) -> object:
        return object()

    def close(self) -> None:
        self.closed = True

    def snapshot(self, stat_fd: int, tries: int = 100) -> Snapshot:
        if self.restless:
            self.done += SECTORS
            self.stat += SECTORS
        c = Counters(self.done, 0, self.queued, 0, 0)
        return Snapshot(c, c, self.stat, 0, self.inflight, not self.restless)


def _mark(into: Bitmap, blocks: set[int]) -> None:
    for b in blocks:
        into.set(b * BLOCK, (b + 1) * BLOCK)
    blocks.clear()


class Made(bpf.BpfTracker):
    """A tracker on a made-up kernel."""

    def __init__(self, kernel: Kernel, disk: str = "sda") -> None:
        dev = BlockDevice(disk, (8, 0), disk, (8, 0), 0, SIZE)
        super().__init__(Source("/dev/made", "block", SIZE, -1, block=dev))
        self.kernel = kernel

    def start(self, plan: UndoLedger | None = None) -> None:
        self._tracking = cast(Any, self.kernel)
        self._find_base()

    def _writes_in_flight(self) -> int:
        return self.kernel.inflight


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf, "QUIET_DEADLINE", 0.01)
    monkeypatch.setattr(bpf, "BASE_DEADLINE", 0.01)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(bpf, "is_bio_based", lambda disk: disk.startswith("dm"))
    return Kernel()


def started(kernel: Kernel, disk: str = "sda") -> Made:
    tracker = Made(kernel, disk)
    kernel.queued_shift = tracker._queued_shift
    tracker.start()
    return tracker


def blocks(batches: list[Batch]) -> set[int]:
    return {
        b for batch in batches for s, e in batch.extents for b in range(s // BLOCK, -(-e // BLOCK))
    }


def compared(repair: Repair | None) -> set[int]:
    assert repair is not None
    assert all(b.changed for b in repair.batches)
    return blocks(repair.batches)


EVERYTHING = set(range(SIZE // BLOCK))


def test_all_events_seen_is_complete(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.write(3)
    assert t.check(quiesced=True).state == "complete"
    assert blocks(t.take()) == {3}
    assert blocks(t.take()) == set()


@pytest.mark.invariant(number=9)
def test_one_lost_event_is_lossy_and_says_how_much(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.write(3)
    kernel.write(4, lost=True)
    completeness = t.check(quiesced=True)
    assert (completeness.state, completeness.missed) == ("lossy", BLOCK)


def test_a_loss_is_found_among_the_submitted_blocks(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.write(3)
    kernel.write(200, lost=True)
    t.take()
    assert t.check(quiesced=True).state == "lossy"
    what = compared(t.repair(quiesced=True))
    assert 200 in what
    assert what != EVERYTHING
    assert t.check(quiesced=True).state == "complete"


def test_a_loss_whose_submission_was_lost_too_compares_everything(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.write(200, lost=True, lost_submission=True)
    assert t.check(quiesced=True).state == "lossy"
    assert compared(t.repair(quiesced=True)) == EVERYTHING
    assert t.check(quiesced=True).state == "complete"


def test_a_repair_while_running_owes_its_proof_until_a_still_moment(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.write(100, lost=True)
    assert t.check(quiesced=False).state == "lossy"
    assert 100 in compared(t.repair(quiesced=False))
    kernel.submit(7)
    assert t.check(quiesced=False).state == "undecided"
    kernel.complete(7)
    assert t.check(quiesced=True).state == "complete"


def test_an_owed_proof_fails_when_submissions_were_missed(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.write(100, lost=True, lost_submission=True)
    assert t.check(quiesced=False).state == "lossy"
    assert 100 not in compared(t.repair(quiesced=False))  # not seen submitted
    completeness = t.check(quiesced=True)
    assert completeness.state == "lossy"
    assert compared(t.repair(quiesced=True)) == EVERYTHING
    assert t.check(quiesced=True).state == "complete"


def test_two_losses_in_a_row_keep_what_the_first_had_submitted(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.write(100, lost=True)
    assert t.check(quiesced=False).state == "lossy"
    t.repair(quiesced=False)
    kernel.write(150, lost=True)
    assert t.check(quiesced=False).state == "lossy"
    assert {100, 150} <= compared(t.repair(quiesced=False))


def test_a_write_in_flight_over_a_proof_is_still_known_at_the_next(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.submit(9)
    assert t.check(quiesced=False).state == "complete"  # so far, but not still
    kernel.complete(9, lost=True)
    assert t.check(quiesced=True).state == "lossy"
    assert 9 in compared(t.repair(quiesced=True))


def test_a_request_that_waits_unseen_over_two_proofs_is_not_forgotten(kernel: Kernel) -> None:
    """A scheduler's queue: submitted, not in flight for sysfs, and slow."""
    t = started(kernel)
    kernel.submit(9, visible=False)
    for n in range(3):
        kernel.write(50 + n)
        assert t.check(quiesced=False).state == "complete"
    kernel.complete(9, lost=True, visible=False)
    assert t.check(quiesced=True).state == "lossy"
    assert 9 in compared(t.repair(quiesced=True))


def test_older_marks_are_forgotten_once_the_sums_agree(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.write(9)
    t.check(quiesced=False)
    t.check(quiesced=False)
    kernel.write(200, lost=True)
    assert t.check(quiesced=True).state == "lossy"
    assert 9 not in compared(t.repair(quiesced=True))


def test_writes_that_stay_in_flight_are_busy_and_can_be_compared(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.submit(5)
    completeness = t.check(quiesced=True)
    assert (completeness.state, completeness.at_most) == ("busy", SIZE)
    assert 5 in compared(t.repair(quiesced=True))


def test_accounting_that_lags_behind_the_events_is_never_complete(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.done += SECTORS
    assert t.check(quiesced=True).state == "undecided"


def test_accounting_that_goes_back_is_repaired_while_running(kernel: Kernel) -> None:
    """As after a reset of the device, or while the accounting was off."""
    t = started(kernel)
    kernel.write(3)
    kernel.stat -= 1000
    completeness = t.check(quiesced=False)
    assert (completeness.state, completeness.needs_repair) == ("undecided", True)
    assert compared(t.repair(quiesced=False)) == EVERYTHING
    kernel.write(4)
    assert t.check(quiesced=True).state == "complete"


def test_accounting_that_catches_up_at_once_needs_no_repair(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = started(kernel)
    kernel.done += SECTORS  # its request is being accounted just now

    def wait(_: float) -> None:
        kernel.stat += SECTORS

    monkeypatch.setattr("pyploop.trackers.bpf.time.sleep", wait)
    assert t.check(quiesced=True).state == "complete"


def test_a_device_that_was_never_still_is_repaired_while_running_once_it_is(
    kernel: Kernel,
) -> None:
    kernel.restless = True
    t = started(kernel)
    assert t.check(quiesced=False).needs_repair
    assert t.repair(quiesced=False) is None
    kernel.restless = False
    assert t.check(quiesced=False).needs_repair
    assert compared(t.repair(quiesced=False)) == EVERYTHING
    assert t.check(quiesced=True).state == "complete"


def test_a_suspicion_stays_until_everything_was_compared(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.stat -= 1000
    assert t.check(quiesced=False).needs_repair
    kernel.stat += 1000  # by chance, as far as anybody knows
    assert t.check(quiesced=True).needs_repair
    assert compared(t.repair(quiesced=True)) == EVERYTHING
    assert t.check(quiesced=True).state == "complete"


def test_a_moving_device_gives_no_repair_while_running(kernel: Kernel) -> None:
    t = started(kernel)
    kernel.write(5, lost=True)
    assert t.check(quiesced=False).state == "lossy"
    kernel.restless = True
    assert t.repair(quiesced=False) is None
    kernel.restless = False
    assert t.check(quiesced=True).state == "lossy"  # the loss was not forgotten
    assert 5 in compared(t.repair(quiesced=True))


def test_a_device_that_was_never_still_compares_everything(kernel: Kernel) -> None:
    kernel.restless = True
    t = started(kernel)
    kernel.restless = False
    kernel.write(5, lost=True)
    completeness = t.check(quiesced=True)
    assert (completeness.state, completeness.at_most) == ("undecided", SIZE)
    assert compared(t.repair(quiesced=True)) == EVERYTHING
    assert t.check(quiesced=True).state == "complete"


def test_writes_in_flight_at_the_start_leave_submissions_unproven(kernel: Kernel) -> None:
    kernel.submit(1)
    t = started(kernel)
    kernel.complete(1)
    kernel.write(5, lost=True, lost_submission=True)
    assert t.check(quiesced=True).state == "lossy"
    assert compared(t.repair(quiesced=True)) == EVERYTHING


def test_a_busy_queue_mode_device_is_proven_after_one_comparison(kernel: Kernel) -> None:
    """dm and md: with no exact base at the start, the repair must make one."""
    kernel.submit(1)
    t = started(kernel, "dm-0")
    kernel.complete(1)
    assert t.check(quiesced=True).state == "undecided"
    assert compared(t.repair(quiesced=True)) == EVERYTHING
    assert t.check(quiesced=True).state == "complete"


def test_a_lost_submission_in_queue_mode_is_proven_after_one_comparison(kernel: Kernel) -> None:
    t = started(kernel, "dm-0")
    kernel.write(5, lost_submission=True)
    assert t.check(quiesced=True).state == "lossy"
    assert t.repair(quiesced=False) is None
    assert compared(t.repair(quiesced=True)) == EVERYTHING
    assert t.check(quiesced=True).state == "complete"


def test_queue_mode_hands_out_again_what_was_in_flight(kernel: Kernel) -> None:
    t = started(kernel, "dm-0")
    assert t.hook() is None
    assert t.pending() is None
    kernel.submit(5)
    assert blocks(t.take()) == {5}
    assert blocks(t.take()) == {5}
    kernel.complete(5)
    assert blocks(t.take()) == {5}
    assert blocks(t.take()) == set()


def test_stop_closes_once_and_never_raises(kernel: Kernel) -> None:
    t = started(kernel)
    t.stop(ok=False)
    t.stop(ok=True)
    assert kernel.closed


def test_modes_follow_the_driver(kernel: Kernel) -> None:
    assert Made(kernel, "sda")._mode == _core.BPF_RQ
    assert Made(kernel, "dm-3")._mode == _core.BPF_QUEUE


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.invariant(number=1)
@pytest.mark.invariant(number=9)
def test_no_random_history_ends_complete_with_a_block_missing(kernel: Kernel, seed: int) -> None:
    import random

    rng = random.Random(seed)
    kernel.restless = rng.random() < 0.2
    t = started(kernel)
    kernel.restless = False
    owed: set[int] = set()  # written, not yet handed out or compared
    flying: list[int] = []

    def settle(got: set[int]) -> None:
        owed.difference_update(got)

    for _ in range(60):
        kind = rng.random()
        block = rng.randrange(SIZE // BLOCK)
        if kind < 0.5:
            owed.add(block)
            kernel.write(block, rng.random() < 0.1, rng.random() < 0.05)
        elif kind < 0.6:
            flying.append(block)
            kernel.submit(block)
        elif kind < 0.7 and flying:
            block = flying.pop(rng.randrange(len(flying)))
            kernel.complete(block, rng.random() < 0.2)
            owed.add(block)
        elif kind < 0.9:
            settle(blocks(t.take()))
            if t.check(quiesced=False).state == "lossy":
                repair = t.repair(quiesced=False)
                settle(blocks(repair.batches) if repair else set())
    for block in flying:
        kernel.complete(block, rng.random() < 0.2)
        owed.add(block)
    for _ in range(3):
        completeness = t.check(quiesced=True)
        got = blocks(t.take())
        settle(got)
        if completeness.state != "complete":
            settle(compared(t.repair(quiesced=True)))
        elif not got:
            break
    else:
        pytest.fail("never complete")
    assert owed == set()
