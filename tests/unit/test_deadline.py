# SPDX-License-Identifier: Apache-2.0
"""The freeze's deadline, on a clock of the test's own."""

from __future__ import annotations

import math

import pytest

from pyploop.errors import LoopError
from pyploop.freeze.deadline import Deadline, Limits

LIMITS = Limits.of(8.0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def deadline(clock: Clock) -> Deadline:
    return Deadline(clock)


def nothing() -> None:
    pass


def test_there_is_no_deadline_before_the_freeze_and_none_after_it(
    deadline: Deadline, clock: Clock
) -> None:
    for _ in range(2):
        assert (deadline.at, deadline.left, deadline.left_to_watchdog) == (math.inf, None, None)
        assert not deadline.passed
        deadline.check()
        deadline.begin(LIMITS, nothing)
        clock.now += 60
        assert deadline.passed
        deadline.clear()


def test_the_limit_counts_from_the_beginning_of_the_freeze(
    deadline: Deadline, clock: Clock
) -> None:
    clock.now = 200.0
    deadline.begin(LIMITS, nothing)
    clock.now += 2.5
    assert deadline.at == 200.0 + LIMITS.own
    assert deadline.left == LIMITS.own - 2.5
    assert deadline.left_to_watchdog == LIMITS.hard - 2.5


@pytest.mark.invariant(number=6)
def test_past_the_limit_the_check_fails_and_nothing_is_left(
    deadline: Deadline, clock: Clock
) -> None:
    deadline.begin(LIMITS, nothing)
    clock.now += LIMITS.own
    deadline.check()
    clock.now += 0.001
    with pytest.raises(LoopError, match=r"8 s \(--freeze-limit\)"):
        deadline.check()
    assert deadline.left == 0.0
    clock.now += 60
    assert deadline.left_to_watchdog == 0.0


def test_once_the_end_may_be_sent_the_answer_has_until_shortly_before_the_hard_limit(
    deadline: Deadline, clock: Clock
) -> None:
    deadline.begin(LIMITS, nothing)
    clock.now += LIMITS.own + 0.001
    assert deadline.passed
    deadline.commit()
    assert not deadline.passed
    assert deadline.at == 100.0 + LIMITS.last
    clock.now = 100.0 + LIMITS.last + 0.001
    assert deadline.passed


def test_without_a_limit_the_end_may_be_sent_at_any_time(deadline: Deadline) -> None:
    deadline.commit()
    assert deadline.at == math.inf


def test_the_check_passes_on_what_the_watchdog_says_until_the_freeze_is_over(
    deadline: Deadline,
) -> None:
    def thawed() -> None:
        raise LoopError("the watchdog thawed")

    deadline.begin(LIMITS, thawed)
    with pytest.raises(LoopError, match="watchdog"):
        deadline.check()
    deadline.clear()
    deadline.check()


def test_a_cancel_ends_all_waiting_for_good_and_is_no_missed_deadline(
    deadline: Deadline,
) -> None:
    deadline.cancel()
    deadline.begin(LIMITS, nothing)
    deadline.commit()
    assert deadline.at == 0.0
    assert not deadline.passed
    deadline.clear()
    assert deadline.at == 0.0
