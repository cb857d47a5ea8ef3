# SPDX-License-Identifier: Apache-2.0
"""The forecast of a suspended time, what earlier migrations change in it, and what
--max-suspend makes of it: against values that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyploop.errors import MigrateError
from pyploop.migration.memory_policy import MemoryRound
from pyploop.migration.source import host_rates, suspend_forecast, suspend_plan
from pyploop.migration.source.checks import Checked
from pyploop.migration.source.request import Request
from pyploop.migration.source.suspend_forecast import (
    CLAMP,
    SAMPLES,
    Contract,
    Factors,
    Facts,
    Line,
    Sample,
    decide,
    expected_memory,
    forecast,
    learn,
    samples_of,
)
from pyploop.report.events import Reporter
from pyploop.runtimes.config import HostConfig
from pyploop.system import contention

GIB = 1 << 30


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round numbers, so that a test can be checked by hand."""
    lines = {
        "suspend": Line(0.01),
        "dump": Line(0.1, 0.6),
        "post-copy dump": Line(0.05, 0.1),
        "transfer": Line(0.02),
        "restore": Line(0.2, 1.0),
        "lazy restore": Line(0.1, 0.05),
    }
    monkeypatch.setattr(suspend_forecast, "MODEL", lines)
    monkeypatch.setattr(suspend_forecast, "OVERLAP", 0.5)


WHOLE = Facts(GIB, wire=GIB / 4, wire_from="probe")


def test_all_memory_is_dumped_sent_and_restored() -> None:
    f = forecast(WHOLE)
    assert f.steps == pytest.approx(
        {"suspend": 0.01, "dump": 0.7, "transfer": 0.02 + 4 - 0.3, "disk": 0, "restore": 1.2}
    )
    assert f.total == pytest.approx(5.63)
    assert f.floor == pytest.approx(5.63)  # no round makes it shorter


def test_disks_that_need_longer_than_the_memory_count_instead_of_it() -> None:
    short, long = (forecast(replace(WHOLE, disk=d)).total for d in (4.0, 7.0))
    assert short == forecast(WHOLE).total
    assert long == pytest.approx(0.01 + 7 + 1.2)


def test_a_connection_faster_than_the_dump_leaves_nothing_to_send_after_it() -> None:
    assert forecast(replace(WHOLE, wire=10 * GIB)).transfer == pytest.approx(0.02)


def test_a_lazy_restore_copies_only_what_cannot_come_later() -> None:
    f = forecast(replace(WHOLE, later="lazy", deferrable=3 * GIB // 4))
    assert f.restore == pytest.approx(0.1 + 0.25 * 1.0 + 0.75 * 0.05)
    assert f.transfer == forecast(WHOLE).transfer


def test_post_copy_sends_only_what_cannot_come_later() -> None:
    f = forecast(replace(WHOLE, later="post-copy", deferrable=GIB))
    assert f.dump == pytest.approx(0.05 + 0.1)
    assert f.transfer == pytest.approx(0.02)
    assert f.restore == pytest.approx(0.1 + 0.05)


def test_what_memory_rounds_have_sent_is_still_restored() -> None:
    f = forecast(Facts(0, ahead=2 * GIB, wire=GIB, shrinks=True))
    assert f.restore == pytest.approx(0.2 + 2.0)
    assert f.dump == pytest.approx(0.1)


def test_the_floor_is_what_is_left_when_rounds_have_sent_everything() -> None:
    f = forecast(replace(WHOLE, shrinks=True, disk=9.0))
    assert f.floor == pytest.approx(0.01 + 0.1 + 0.02 + 1.2)


def test_busy_hosts_take_longer_for_their_own_steps() -> None:
    f, idle = forecast(replace(WHOLE, busy=2.0, busy_there=3.0)), forecast(WHOLE)
    assert f.dump == pytest.approx(2 * idle.dump)
    assert f.restore == pytest.approx(3 * idle.restore)
    # A slower dump leaves more time for what crosses beside it.
    assert f.transfer == pytest.approx(0.02 + 4 - 0.6)


def test_an_unknown_speed_is_taken_for_a_slow_one() -> None:
    f = forecast(Facts(GIB))
    assert f.transfer == pytest.approx(0.02 + GIB / 100e6 - 0.3)
    assert "a speed not known" in f.in_words()


# ---- earlier migrations


def test_small_migrations_correct_the_fixed_part_and_large_ones_the_speed() -> None:
    dump = [Sample(0.1, 0.0, 0.2), Sample(0.1, 0.6, 0.2 + 0.9), Sample(0.1, 0.01, 0.22)]
    learned = learn({"dump": dump})
    assert learned["dump"].fixed == pytest.approx((0.2 / 0.1 + 0.22 / 0.1) / 2)
    assert learned["dump"].variable == pytest.approx((1.1 - 2.1 * 0.1) / 0.6)
    assert learned["dump"].samples == 3
    f = forecast(WHOLE, learned)
    assert f.dump == pytest.approx(2.1 * 0.1 + 0.89)
    assert f.learned == {"suspend": 0, "dump": 3, "transfer": 0, "restore": 0}
    assert "by a model" in f.in_words()


def test_one_slow_migration_does_not_spoil_the_others() -> None:
    usual = [Sample(0.1, 0.0, 0.1)] * 4
    assert learn({"dump": [*usual, Sample(0.1, 0.0, 30.0)]})["dump"].fixed == pytest.approx(1)


def test_a_correction_is_bounded_and_the_last_migrations_count() -> None:
    wild = learn({"dump": [Sample(0.1, 0.0, 1e6)] * 3})["dump"]
    assert wild.fixed == CLAMP
    old = [Sample(0.1, 0.0, 0.9)] * SAMPLES
    new = [Sample(0.1, 0.0, 0.1)] * SAMPLES
    assert learn({"dump": old + new})["dump"] == Factors(1.0, 1.0, SAMPLES)


def test_a_forecast_by_its_own_outcome_is_that_outcome() -> None:
    actual = {"suspend": 0.03, "dump": 1.4, "transfer": 2.0, "restore": 2.5}
    shown = samples_of(WHOLE, actual)
    f = forecast(WHOLE, learn({name: [s] for name, s in shown.items()}))
    steps = f.steps
    steps.pop("disk")
    assert steps == pytest.approx(actual)


def test_each_kind_of_restore_is_learned_by_itself() -> None:
    lazy = replace(WHOLE, later="lazy", deferrable=GIB)
    shown = samples_of(lazy, {"restore": 0.1})
    assert set(shown) == {"lazy restore"}
    learned = learn({name: [s] for name, s in shown.items()})
    assert forecast(WHOLE, learned).restore == forecast(WHOLE).restore


def test_what_is_recorded_is_read_again_per_runtime_and_host(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    state, one = str(tmp_path), Sample(0.1, 0.2, 0.35)
    for n in range(SAMPLES + 3):
        host_rates.add(state, "runc", "root@hostb", {"dump": replace(one, actual=float(n))})
    kept = host_rates.read(state, "runc", "hostb")["dump"]
    assert [s.actual for s in kept] == [float(n) for n in range(3, SAMPLES + 3)]
    assert host_rates.read(state, "vzctl", "hostb") == {}
    assert host_rates.read(state, "runc", "hostc") == {}
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        '{"schema": "pyploop.rates/0", "steps": {"dump": [[1, 1, 1]]}}',
        '{"schema": "pyploop.rates/1", "steps": {"dump": [["x"]]}}',
        '{"schema": "pyploop.rates/1", "steps": {"dump": [[0, 1, NaN], [0, 0, 1], [1, -1, 1]]}}',
        '{"schema": "pyploop.rates/1", "steps": 7}',
        '{"schema": "pyploop.rates/1"}',
        '{"schema": "pyploop.rates/1", "steps": {"dump": [[1' + "0" * 400 + ", 1, 1]]}}",
        "[" * 100_000,
    ],
)
def test_a_record_that_is_damaged_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    tmp_path.chmod(0o700)
    path = host_rates.path_of(str(tmp_path), "runc", "b")
    path.write_text(text)
    assert not any(host_rates.read(str(tmp_path), "runc", "b").values())
    host_rates.add(str(tmp_path), "runc", "b", {"dump": Sample(0.1, 0.0, 0.2)})
    assert host_rates.read(str(tmp_path), "runc", "b")["dump"] == [Sample(0.1, 0.0, 0.2)]


def test_a_record_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    host_rates.add(str(tmp_path / "file"), "runc", "b", {"dump": Sample(0.1, 0.0, 0.2)})


def test_a_host_is_never_quicker_than_an_idle_one() -> None:
    assert contention.busy() >= 1.0


# ---- the size of the next dump


def test_without_rounds_all_memory_is_in_the_dump() -> None:
    assert expected_memory(700, [], 0.0) == 700


def test_after_one_round_only_what_has_grown_is_known() -> None:
    assert expected_memory(700, [(600, 0.0)], 5.0) == 100
    assert expected_memory(500, [(600, 0.0)], 5.0) == 0


def test_after_more_rounds_the_speed_of_writing_is_known() -> None:
    rounds = [(600, 0.0), (100, 2.0)]
    assert expected_memory(700, rounds, 1.0) == 50
    assert expected_memory(700, rounds, 100.0) == 700


# ---- --max-suspend


def test_without_a_limit_it_is_suspended_at_once() -> None:
    verdict = decide(forecast(WHOLE), Contract(), 0.0)
    assert (verdict.action, verdict.fits) == ("suspend", True)


def test_what_fits_is_suspended() -> None:
    verdict = decide(forecast(WHOLE), Contract(5.7), 0.0)
    assert (verdict.action, verdict.fits) == ("suspend", True)
    assert verdict.why == "5630 ms expected, 5700 ms allowed"


@pytest.mark.parametrize(("on_deadline", "action"), [("abort", "abort"), ("freeze", "suspend")])
def test_what_no_round_can_make_fit_is_not_waited_for(on_deadline: Any, action: str) -> None:
    verdict = decide(forecast(WHOLE), Contract(5.0, 600, on_deadline), 0.0)
    assert (verdict.action, verdict.fits) == (action, False)
    assert "5630 ms of it would be left after any number of rounds" in verdict.why


@pytest.mark.parametrize(("on_deadline", "action"), [("abort", "abort"), ("freeze", "suspend")])
def test_what_may_still_fit_is_waited_for_until_the_deadline(on_deadline: Any, action: str) -> None:
    f = forecast(replace(WHOLE, disk=9.0))
    contract = Contract(6.0, 30.0, on_deadline)
    assert decide(f, contract, 29.9).action == "again"
    verdict = decide(f, contract, 30.0)
    assert (verdict.action, verdict.fits) == (action, False)
    assert "no moment fitted within 30 s" in verdict.why


# ---- in a migration


class _Remote:
    """An agent of an older version: it knows no probe."""

    capabilities: tuple[str, ...] = ()


class _Runtime:
    name, container = "runc", "web"
    memory = GIB

    def memory_now(self) -> int:
        return self.memory


class _Memory:
    rounds: list[MemoryRound]
    parent, age, speed, wanted = 0, 0.0, 0.0, False

    def __init__(self) -> None:
        self.rounds, self.asked = [], 0

    def round(self, wire: float) -> bool:
        self.asked += 1
        return False


class _Copies:
    """Disks whose forecast becomes smaller from approach to approach."""

    wire = float(GIB)

    def __init__(self, *seconds: float) -> None:
        self._left = list(seconds)

    def prepare_freeze(self) -> None:
        self._left.pop(0)

    def forecast(self) -> float:
        return self._left[0]


class _Events:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.lines: list[str] = []

    def event(self, name: str, at: float, fields: dict[str, Any]) -> None:
        self.events.append((name, fields))

    def line(self, level: int, at: float, text: str) -> None:
        self.lines.append(text)

    def error(self, at: float, text: str, hint: str | None) -> None: ...

    def close(self) -> None: ...


def _plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **request: Any
) -> tuple[suspend_plan.SuspendPlan, _Events]:
    monkeypatch.setattr(suspend_plan, "PAUSE", 0.0)
    monkeypatch.setattr(contention, "busy", lambda: 1.0)
    report, events = Reporter(), _Events()
    report.add(events)
    folder.chmod(0o700)
    plan = suspend_plan.SuspendPlan(
        HostConfig(state_dir=str(folder)),
        _Runtime(),  # type: ignore[arg-type]
        Request("b", True, **request),
        report,
        remote=_Remote(),  # type: ignore[arg-type]
        checked=Checked([], {}, True, GIB, None, None, False),
    )
    return plan, events


def test_the_disks_approach_again_until_the_suspended_time_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.01 + 0.7 + 0.72 + 1.2 = 2.63 s without the disks."""
    plan, events = _plan(tmp_path, monkeypatch, max_suspend=3.0)
    copies, memory = _Copies(9.0, 8.0, 0.5), _Memory()
    plan.wait(copies, memory)  # type: ignore[arg-type]
    assert memory.asked == 2
    assert plan.total == pytest.approx(2.63)
    ((name, fields),) = events.events
    assert (name, fields["moment"], fields["max_suspend"]) == ("forecast", "suspend", 3.0)
    assert (fields["wire"], fields["wire_from"]) == (GIB, "first pass")
    assert [t for t in events.lines if "Not suspended yet" in t] != []


def test_a_container_that_is_refused_is_not_suspended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, events = _plan(tmp_path, monkeypatch, max_suspend=2.0)
    with pytest.raises(MigrateError, match="2630 ms expected, 2000 ms allowed") as caught:
        plan.wait(_Copies(0.1), _Memory())  # type: ignore[arg-type]
    assert caught.value.exit_code == 6
    assert "--on-deadline freeze" in str(caught.value.hint)
    assert [name for name, _ in events.events] == ["forecast"]


def test_a_container_that_has_shrunk_counts_as_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Runtime, "memory", GIB // 2)
    plan, _ = _plan(tmp_path, monkeypatch)
    plan.wait(_Copies(0.1), _Memory())  # type: ignore[arg-type]
    assert plan.last is not None
    assert plan.last.facts.memory == GIB // 2
