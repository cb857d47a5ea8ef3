# SPDX-License-Identifier: Apache-2.0
"""B: completion events get lost on some machines.  Here they are lost on
purpose, between the kernel and the tracker, and the copy must be right all the
same, and say so.

The loss is as the kernel has it: a mark that never appears, and counters that
never count it, both from the moment at which the write completes."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import MIB, loop_device, needs
from support_live import random_file, same, work_dir

from pyploop._core import Bitmap, BpfTracking, Counters, Extents, Hook, Snapshot
from pyploop.diskcopy import repairs
from pyploop.diskcopy.freeze_stage import FreezeStage
from pyploop.diskcopy.options import Options, Summary
from pyploop.diskcopy.repairs import Repairs
from pyploop.diskcopy.sender import Sender
from pyploop.diskcopy.target_file import Sink
from pyploop.diskcopy.target_registry import FileOutput
from pyploop.disks import opening
from pyploop.errors import DeviceControlError, LoopError
from pyploop.freeze import stoppers
from pyploop.report.events import Reporter
from pyploop.trackers import bpf
from pyploop.undo.ledger import UndoLedger

pytestmark = pytest.mark.root

BLOCK = 4096
SECTORS = BLOCK // 512
SIZE = 24 * MIB


class Loss:
    """What is lost: `done` and `queued` are the parts of all events while
    `on`; `counted` false: the counters lose them too, as they really do;
    `early`: also what no check has looked at before it is taken."""

    def __init__(
        self,
        done: float = 0.0,
        queued: float = 0.0,
        counted: bool = False,
        early: bool = False,
    ) -> None:
        self.done, self.queued, self.counted, self.early = done, queued, counted, early
        self.on = True
        self.lost_done = self.lost_queued = 0
        self.dice = random.Random(1)


class LossyTracking:
    """BpfTracking, some of whose events get lost before each look at it."""

    loss: Loss

    def __init__(self, **settings: Any) -> None:
        self._real = BpfTracking(**settings)
        size = settings["end"] - settings["start"]
        self._done = Bitmap(size, settings["done_shift"])
        self._queued = Bitmap(size, settings["queued_shift"])
        self._minus = {"done_write": 0, "queued_write": 0}

    def _lose(self, taken: Bitmap, into: Bitmap, part: float, counter: str) -> int:
        """Move `taken` into what the tracker will get, except what is lost."""
        lost = 0
        granule = 1 << taken.shift
        for start, end in taken.extents():
            for at in range(start, end, granule):
                if self.loss.on and self.loss.dice.random() < part:
                    lost += 1
                else:
                    into.set(at, at + 1)
        if not self.loss.counted:
            self._minus[counter] += lost * SECTORS
        return lost

    def snapshot(self, stat_fd: int, tries: int = 100) -> Snapshot:
        done, queued = self._like(self._done), self._like(self._queued)
        self._real.take_done(done)
        self._real.take_queued(queued)
        self.loss.lost_done += self._lose(done, self._done, self.loss.done, "done_write")
        self.loss.lost_queued += self._lose(queued, self._queued, self.loss.queued, "queued_write")
        shot = self._real.snapshot(stat_fd, tries)
        return shot._replace(before=self._less(shot.before), after=self._less(shot.after))

    def _less(self, c: Counters) -> Counters:
        return c._replace(**{k: getattr(c, k) - v for k, v in self._minus.items()})

    @staticmethod
    def _like(b: Bitmap) -> Bitmap:
        return Bitmap(b.size, b.shift)

    def take_done(self, into: Bitmap) -> None:
        into.update(self._done)
        self._done.zero()
        if not self.loss.early:
            self._real.take_done(into)
            return
        late = self._like(into)
        self._real.take_done(late)
        self.loss.lost_done += self._lose(late, into, self.loss.done, "done_write")

    def take_extents(self) -> Extents:
        taken = self._like(self._done)
        self.take_done(taken)
        return taken.extents()

    def take_queued(self, into: Bitmap) -> None:
        into.update(self._queued)
        self._queued.zero()
        self._real.take_queued(into)

    def peek_done(self) -> int:
        return self._real.peek_done()

    def hook(self) -> Hook:
        return self._real.hook()

    def close(self) -> None:
        self._real.close()


class Direct:
    """Writes of random blocks, past the page cache."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
        self._page = mmap.mmap(-1, BLOCK)
        self._dice = random.Random(2)

    def write(self, blocks: int) -> None:
        for number in self._dice.sample(range(SIZE // BLOCK), blocks):
            self._page[:] = self._dice.randbytes(BLOCK)
            os.pwrite(self._fd, self._page, number * BLOCK)

    def close(self) -> None:
        os.close(self._fd)
        self._page.close()


class Script:
    """A renderer that acts at the copy's phases; at "frozen", whose event is
    held back until the thaw, the stop command acts (Lab.copy)."""

    def __init__(self, act: Callable[[str], None]) -> None:
        self._act = act
        self.repairs: list[dict[str, Any]] = []
        self.verdicts: list[str] = []

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        if name == "phase" and fields["phase"] != "frozen":
            self._act(fields["phase"])
        elif name == "repair":
            self.repairs.append(fields)
        elif name == "round" and fields["number"]:
            self.verdicts.append(fields["verdict"])

    def line(self, level: int, at: float, text: str) -> None:
        pass

    def error(self, at: float, text: str, hint: str | None) -> None:
        pass

    def close(self) -> None:
        pass


class Lab:
    """One loop device, copied with losses while a script writes to it."""

    def __init__(self, folder: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self.path, self._monkeypatch = folder, path, monkeypatch
        self.target = folder / "target"
        self.writer = Direct(path)

    def copy(
        self, loss: Loss, act: Callable[[str], None], undo: str | None = None
    ) -> tuple[Summary, Script]:
        """undo: of the stop command."""
        tracking = type("Lossy", (LossyTracking,), {"loss": loss})
        self._monkeypatch.setattr(bpf, "BpfTracking", tracking)
        self._monkeypatch.setattr(stoppers, "run_command", lambda *_: act("frozen"))
        self.target.unlink(missing_ok=True)
        script = Script(act)
        report = Reporter()
        report.add(script)
        with (
            contextlib.closing(opening.open_source(self.path)) as source,
            Sink(str(self.target)) as sink,
        ):
            out = FileOutput(sink)
            options = Options(stops=[stoppers.Spec("cmd", "the script", undo)])
            summary = Sender(source, bpf.BpfTracker(source), out, options, report).run()
        return summary, script

    def identical(self) -> bool:
        return same(self.path, self.target, SIZE, direct=True)


def iostats(path: str) -> Path:
    return Path("/sys/block", Path(path).name, "queue/iostats")


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    needs("loop")
    with work_dir() as folder:
        image = random_file(folder / "image", SIZE)
        with loop_device(image) as path:
            made = Lab(folder, path, monkeypatch)
            switch = iostats(path)
            before = switch.read_text()
            switch.write_text("1")
            try:
                yield made
            finally:
                made.writer.close()
                switch.write_text(before)  # the kernel keeps it for the next file


def everywhere(lab: Lab, blocks: int = 300) -> Callable[[str], None]:
    """Write in every round and at the beginning of the freeze."""

    def act(phase: str) -> None:
        if phase.startswith(("round", "frozen")):
            lab.writer.write(blocks)

    return act


def test_lost_completions_are_found_among_the_submitted_blocks(lab: Lab) -> None:
    loss = Loss(done=0.3)
    summary, script = lab.copy(loss, everywhere(lab))
    assert lab.identical()
    assert loss.lost_done > 100
    assert summary.completeness == "complete"
    assert summary.repairs == len(script.repairs) >= 2
    assert summary.repaired_bytes >= loss.lost_done // 2 * BLOCK
    assert "lossy" in script.verdicts
    assert all("submitted" in r["scope"] for r in script.repairs)
    assert any(r["frozen"] for r in script.repairs) and not all(r["frozen"] for r in script.repairs)


def test_when_submissions_are_lost_too_everything_is_compared(lab: Lab) -> None:
    loss = Loss(done=0.3, queued=0.5)
    summary, script = lab.copy(loss, everywhere(lab))
    assert lab.identical()
    assert loss.lost_done and loss.lost_queued
    assert summary.completeness == "complete"
    assert any("whole source" in r["scope"] for r in script.repairs)


def test_a_loss_in_the_freeze_alone_is_repaired_in_the_freeze(lab: Lab) -> None:
    loss = Loss(done=1.0)
    loss.on = False

    def act(phase: str) -> None:
        loss.on = phase == "frozen"
        if phase.startswith("round") or loss.on:
            lab.writer.write(200)

    summary, script = lab.copy(loss, act)
    assert lab.identical()
    assert loss.lost_done == 200
    assert [r["frozen"] for r in script.repairs] == [True]
    # All but those few that the last round had dirtied too.
    assert summary.repaired_bytes >= 150 * BLOCK
    assert "lossy" not in script.verdicts and summary.completeness == "complete"


def test_a_loss_while_running_is_repaired_while_running(lab: Lab) -> None:
    loss = Loss(done=1.0)

    def act(phase: str) -> None:
        loss.on = phase.startswith("round")
        if loss.on:
            lab.writer.write(200)

    summary, script = lab.copy(loss, act)
    assert lab.identical()
    assert script.repairs and not any(r["frozen"] for r in script.repairs)
    assert summary.repaired_bytes >= 200 * BLOCK
    assert summary.completeness == "complete"


def test_submissions_alone_may_be_lost_without_a_repair(lab: Lab) -> None:
    summary, script = lab.copy(Loss(queued=1.0), everywhere(lab))
    assert lab.identical()
    assert summary.completeness == "complete" and not script.repairs


@pytest.mark.invariant(number=9)
def test_a_single_lost_event_is_noticed(lab: Lab) -> None:
    loss = Loss(done=1.0)

    def act(phase: str) -> None:
        loss.on = phase == "round 1"
        if phase.startswith("round"):
            lab.writer.write(1)

    summary, script = lab.copy(loss, act)
    assert lab.identical()
    assert loss.lost_done == 1
    assert [r["sent"] for r in script.repairs] == [BLOCK]
    assert summary.completeness == "complete"


def test_losses_in_the_first_pass_are_repaired(lab: Lab) -> None:
    loss = Loss(done=1.0, early=True)
    begun, over = threading.Event(), threading.Event()

    def churn() -> None:
        while not over.is_set():
            lab.writer.write(20)
            begun.set()

    thread = threading.Thread(target=churn)

    def act(phase: str) -> None:
        loss.on = phase == "first pass"
        if loss.on:
            thread.start()
            begun.wait()  # else a busy machine may end the pass before the first write
        else:
            # "round 1" comes when the marks of the first pass were taken.
            over.set()
            thread.join()

    summary, script = lab.copy(loss, act)
    assert lab.identical()
    assert loss.lost_done > 0
    assert script.verdicts[0] == "lossy" and script.repairs and not script.repairs[0]["frozen"]
    assert summary.completeness == "complete"


def test_without_the_counters_a_loss_would_show_in_the_comparison(lab: Lab) -> None:
    """The control: the losses above are real ones."""
    loss = Loss(done=0.5, counted=True, early=True)
    summary, script = lab.copy(loss, everywhere(lab))
    assert loss.lost_done
    assert summary.repairs == 0, script.repairs
    assert not lab.identical()


def test_a_source_that_is_written_for_ever_after_the_stop_makes_no_target(lab: Lab) -> None:
    tracker_take = bpf.BpfTracker.take

    def take(self: bpf.BpfTracker) -> Any:
        lab.writer.write(5)
        return tracker_take(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpf.BpfTracker, "take", take)
        with pytest.raises(LoopError):
            lab.copy(Loss(), lambda _: None)
    assert not lab.target.exists()


# ---- how long a repair may take inside the freeze


MANY = 5000
"""Blocks, more than are compared before the first look at the time."""


def losing_in_freezes(lab: Lab, loss: Loss, freezes: int) -> Callable[[str], None]:
    """The first so many freezes lose all completions."""
    loss.on = False
    done = 0

    def act(phase: str) -> None:
        nonlocal done
        done += phase == "frozen"
        loss.on = phase == "frozen" and done <= freezes
        if loss.on:
            lab.writer.write(MANY)

    return act


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The freeze leaves no time to a repair that is not done at once."""
    monkeypatch.setattr(FreezeStage, "allowed", 0.0)


def test_a_long_repair_is_done_after_a_thaw_and_the_freeze_begun_again(
    lab: Lab, no_time: None
) -> None:
    loss = Loss(done=1.0)
    undone = lab.target.with_name("undone")
    act = losing_in_freezes(lab, loss, 1)
    summary, script = lab.copy(loss, act, undo=f"echo >>{undone}")
    assert lab.identical()
    assert (summary.freezes_given_up, summary.completeness) == (1, "complete")
    assert undone.read_text() == "\n", "undone once: before the second freeze"
    # A slice inside the freeze, the rest while running; all that was lost.
    assert [r["frozen"] for r in script.repairs] == [True, False]
    assert sum(r["sent"] for r in script.repairs) == MANY * BLOCK
    assert "repair" not in summary.frozen


def test_repairs_that_are_too_long_in_every_freeze_end_the_copy(lab: Lab, no_time: None) -> None:
    loss = Loss(done=1.0)
    freezes = lab.target.with_name("undone")
    act = losing_in_freezes(lab, loss, 99)
    with pytest.raises(LoopError, match="too long for a freeze") as failed:
        lab.copy(loss, act, undo=f"echo >>{freezes}")
    assert failed.value.exit_code == 14
    assert freezes.read_text() == "\n" * 3
    assert not lab.target.exists()


def test_after_a_stop_that_cannot_be_undone_a_long_repair_is_done_in_the_freeze(
    lab: Lab, no_time: None
) -> None:
    loss = Loss(done=1.0)
    summary, script = lab.copy(loss, losing_in_freezes(lab, loss, 1))
    assert lab.identical()
    assert (summary.freezes_given_up, summary.completeness) == (0, "complete")
    assert [(r["frozen"], r["sent"]) for r in script.repairs] == [(True, MANY * BLOCK)]


def test_a_repair_that_the_freeze_limit_does_not_allow_ends_the_copy(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Loss(done=1.0)
    begin = Repairs.run

    def slowly(self: Repairs, *args: Any, **how: Any) -> int | None:
        self.rate = 1000.0  # bytes per second
        return begin(self, *args, **how)

    monkeypatch.setattr(Repairs, "run", slowly)
    with pytest.raises(LoopError, match=r"longer than the freeze may last .*--undo") as failed:
        lab.copy(loss, losing_in_freezes(lab, loss, 1))
    assert failed.value.exit_code == 14
    assert not lab.target.exists()


# ---- the accounting that all is proven against


def test_accounting_that_is_switched_off_while_running_is_repaired_while_running(
    lab: Lab,
) -> None:
    switch = iostats(lab.path)
    seen = []

    def act(phase: str) -> None:
        if phase == "first pass":
            switch.write_text("0")
        if phase == "round 1":
            lab.writer.write(200)
        if phase.startswith("round"):
            seen.append(switch.read_text().strip())

    summary, script = lab.copy(Loss(), act)
    assert lab.identical()
    assert summary.completeness == "complete"
    assert seen[0] == "0" and set(seen[1:]) == {"1"}, "on again after the first round"
    assert script.repairs and not any(r["frozen"] for r in script.repairs)
    assert "accounting" in script.repairs[0]["scope"]
    assert switch.read_text().strip() == "0", "as somebody wants it"


def test_what_is_lost_while_the_accounting_is_off_for_a_moment_is_found(lab: Lab) -> None:
    """Neither the counters nor the accounting know of it: both are as before."""
    switch = iostats(lab.path)
    loss = Loss(done=1.0)
    loss.on = False

    def act(phase: str) -> None:
        loss.on = phase == "round 1"
        if loss.on:
            switch.write_text("0")
            lab.writer.write(100)
            switch.write_text("1")

    summary, script = lab.copy(loss, act)
    assert loss.lost_done == 100
    assert lab.identical()
    assert summary.completeness == "complete"
    assert any("accounting" in r["scope"] and not r["frozen"] for r in script.repairs)


def test_accounting_that_is_switched_off_in_every_round_and_freeze_ends_the_copy(
    lab: Lab, no_time: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = iostats(lab.path)
    monkeypatch.setattr(repairs, "SLICE", MIB)

    def act(phase: str) -> None:
        if phase.startswith(("round", "frozen")):
            switch.write_text("0")

    with pytest.raises(LoopError, match="accounting of the disk") as failed:
        lab.copy(Loss(), act, undo="true")
    assert failed.value.exit_code == 14
    assert not lab.target.exists()


@pytest.mark.invariant(number=9)
def test_accounting_that_is_switched_off_all_the_time_ends_the_copy_with_its_reason(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each repair inside the freeze is short, and yet nothing is proven."""
    switch = iostats(lab.path)
    run = Repairs.run

    def run_and_switch_off(self: Repairs, *args: Any, **how: Any) -> int | None:
        sent = run(self, *args, **how)
        switch.write_text("0")
        return sent

    monkeypatch.setattr(Repairs, "run", run_and_switch_off)

    def act(phase: str) -> None:
        if phase == "round 1":
            switch.write_text("0")

    with pytest.raises(LoopError, match=r"could not be proven complete .*accounting") as failed:
        lab.copy(Loss(), act)
    assert failed.value.exit_code == 14
    assert not lab.target.exists()


def test_accounting_that_cannot_be_switched_on_again_ends_the_copy(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = iostats(lab.path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def act(phase: str) -> None:
        if phase == "round 1":
            switch.write_text("0")
            monkeypatch.setattr(UndoLedger, "set_file", refuse)

    with pytest.raises(DeviceControlError, match=r"accounting .*Read-only"):
        lab.copy(Loss(), act)
    assert not lab.target.exists()


def test_another_scheduler_during_the_copy_loses_nothing(lab: Lab) -> None:
    knob = iostats(lab.path).with_name("scheduler")
    names = [n.strip("[]") for n in knob.read_text().split()]
    if len(names) < 2:
        pytest.skip("the kernel has one I/O scheduler only")

    def act(phase: str) -> None:
        lab.writer.write(100)
        if phase.startswith(("round", "frozen")):
            knob.write_text(names[-1] if phase == "round 1" else names[0])
            lab.writer.write(100)

    summary, _ = lab.copy(Loss(), act)
    assert lab.identical()
    assert summary.completeness == "complete"
