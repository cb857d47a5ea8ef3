# SPDX-License-Identifier: Apache-2.0
"""The forecast of the suspended time in one migration: what it is made from is measured,
--max-suspend is kept, and afterwards it is compared with what came of it.
suspend_forecast.py decides."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import geometric_mean

from pyploop.errors import MigrateError, VzExitCode
from pyploop.migration.source import host_rates, post_copy, wire_probe
from pyploop.migration.source.agent_client import Remote
from pyploop.migration.source.checks import Checked
from pyploop.migration.source.memory import Memory
from pyploop.migration.source.payload import Copies
from pyploop.migration.source.request import Request
from pyploop.migration.source.suspend_forecast import (
    Contract,
    Facts,
    SuspendForecast,
    Verdict,
    decide,
    expected_memory,
    forecast,
    learn,
    samples_of,
)
from pyploop.report.events import Reporter
from pyploop.report.timings import Moments
from pyploop.runtimes import Runtime, lazy_policy
from pyploop.runtimes.config import HostConfig
from pyploop.system import contention
from pyploop.system.jobs import Latch

PAUSE = 0.5
"""Seconds between two attempts that did not fit: each stalls the container's writers."""
LATELY = 60.0
HINT = (
    "allow a longer --max-suspend, or more time for it (--deadline), migrate when less is "
    "written, or suspend it in any case (--on-deadline freeze)"
)


class SuspendPlan:
    """Of one live migration."""

    def __init__(
        self,
        host: HostConfig,
        runtime: Runtime,
        request: Request,
        report: Reporter,
        *,
        remote: Remote,
        checked: Checked,
    ) -> None:
        self._host, self._runtime = host, runtime
        self._request, self._report = request, report
        self._checked, self._announced = checked, checked.memory
        policy = request.copy.policy
        self._contract = Contract(request.max_suspend, policy.deadline, policy.on_deadline)
        self._learned = learn(host_rates.read(host.state_dir, runtime.name, request.host))
        self._remote = remote
        self._busy, self._busy_there = _Lately(), _Lately()
        self._wires: dict[str, float] = {}
        self.choice = post_copy.choose(checked.post_copy, 0.0)
        """Whether the pages follow, by the last forecast."""
        self.last: SuspendForecast | None = None
        """The last forecast."""

    @property
    def total(self) -> float | None:
        """Seconds, by the last forecast."""
        return self.last.total if self.last else None

    # ---- before anything starts

    def check(self) -> None:
        """The forecast by what is known before anything starts."""
        self._wires["probe"] = wire_probe.measure(self._remote)
        whole = self._dumped(self._announced)
        rounds = self._checked.rounds is not None
        f, verdict = self._decide(self._lazily(Facts(whole, shrinks=rounds)), elapsed=0.0)
        self._show("check", f)
        if verdict.fits:
            return
        if self._request.check_only and self._contract.on_deadline == "abort":
            raise self._refused(verdict)
        self._report.note(
            f"By now this is more than --max-suspend allows ({verdict.why}); it is decided before "
            "the container is suspended"
        )

    # ---- before the suspension

    def wait(self, copies: Copies, memory: Memory) -> None:
        """Return when the container may be suspended.  MigrateError(6): it may not be."""
        start = time.monotonic()
        while True:
            if copies.wire:
                self._wires["first pass"] = copies.wire
            self._wires["memory rounds"] = memory.speed
            f, verdict = self._decide(self._facts(copies, memory), time.monotonic() - start)
            if verdict.action != "again":
                break
            self._report.info(f"Not suspended yet: {verdict.why}")
            Latch().wait(PAUSE)
            memory.round(self._wire()[0])
            copies.prepare_freeze()
        self._show("suspend", f)
        if verdict.action == "abort":
            raise self._refused(verdict)
        if not verdict.fits:
            self._report.note(
                f"The container is suspended although --max-suspend is not kept "
                f"(--on-deadline freeze): {verdict.why}"
            )

    def _decide(self, facts: Facts, elapsed: float) -> tuple[SuspendForecast, Verdict]:
        """Also whether the pages follow."""
        f = self._forecast(facts)
        self.choice = post_copy.choose(self._checked.post_copy, f.total)
        if self.choice.chosen:
            f = self._forecast(self._following(facts))
        return f, decide(f, self._contract, elapsed)

    def _following(self, facts: Facts) -> Facts:
        """The same with post-copy."""
        whole, ahead, kinds = facts.memory, facts.ahead, self._checked.kinds
        if not self._lazy_rounds:  # what was sent ahead is not used
            whole, ahead = whole + ahead, 0
        part = 1.0
        if kinds is not None and kinds.private + kinds.whole:
            part = kinds.private / (kinds.private + kinds.whole)
        return replace(
            facts,
            memory=whole,
            ahead=int(ahead * (1 - part)),
            later="post-copy",
            deferrable=int(whole * part),
            shrinks=False,
        )

    @property
    def _lazy_rounds(self) -> bool:
        """The target loads lazily also what was sent ahead."""
        return "lazy-rounds" in self._remote.capabilities

    @property
    def in_use(self) -> int:
        """Bytes of memory, as they are known."""
        return self.last.facts.memory if self.last else self._announced

    def _facts(self, copies: Copies, memory: Memory) -> Facts:
        whole = self._dumped(self._runtime.memory_now() or self._announced)
        rounds = [(r.sent, r.window) for r in memory.rounds] if memory.parent else []
        ahead = sum(sent for sent, _ in rounds)
        size = expected_memory(whole, rounds, memory.age)
        return self._lazily(
            Facts(
                size,
                ahead=min(ahead, max(whole - size, 0)) if whole else ahead,
                disk=copies.forecast(),
                shrinks=memory.wanted,
            )
        )

    def _dumped(self, in_use: int) -> int:
        """Bytes in a whole dump of so much memory: the pages of mapped files are not in it."""
        kinds = self._checked.kinds
        if kinds is None or not self._announced:
            return in_use
        return int(in_use * min((kinds.private + kinds.whole) / self._announced, 1.0))

    def _lazily(self, facts: Facts) -> Facts:
        """The same with what the target loads after the container runs."""
        kinds = self._checked.kinds
        want = self._request.lazy_restore
        if not self._checked.lazy or kinds is None or not kinds.private:
            return facts
        part = kinds.private / (kinds.private + kinds.whole)
        ahead = facts.ahead if self._lazy_rounds else 0
        if not lazy_policy.choose_again(want, int((facts.memory + ahead) * part)).lazy:
            return facts
        deferrable, copied = int(facts.memory * part), facts.ahead - int(ahead * part)
        return replace(facts, later="lazy", deferrable=deferrable, ahead=copied)

    def _wire(self) -> tuple[float, str]:
        """The fastest that this connection has shown, and by what: each is a lower bound."""
        name = max(self._wires, key=lambda name: self._wires[name], default="")
        rate = self._wires.get(name, 0.0)
        return rate, name if rate else ""

    def _forecast(self, facts: Facts) -> SuspendForecast:
        rate, name = self._wire()
        facts = replace(
            facts,
            wire=rate,
            wire_from=name,
            busy=self._busy.add(contention.busy()),
            busy_there=self._busy_there.add(wire_probe.busy(self._remote)),
        )
        self.last = forecast(facts, self._learned)
        return self.last

    def _refused(self, verdict: Verdict) -> MigrateError:
        return MigrateError(
            VzExitCode.COPY_FAILED,
            f"the suspended time of container {self._runtime.container} would not be within "
            f"--max-suspend: {verdict.why}; it was not suspended",
            hint=HINT,
        )

    def _show(self, moment: str, f: SuspendForecast) -> None:
        self._report.event(
            "forecast",
            moment=moment,
            total=f.total,
            steps=f.steps,
            floor=f.floor,
            memory=f.facts.memory,
            later=f.facts.later,
            wire=f.facts.wire,
            wire_from=f.facts.wire_from,
            busy=f.facts.busy,
            busy_there=f.facts.busy_there,
            learned=f.learned,
            max_suspend=self._contract.max_suspend,
        )
        text = f"Forecast of the suspended time: {f.in_words()}"
        if moment == "check" and self._request.check_only:
            self._report.note(text)
        else:
            self._report.info(text)

    # ---- afterwards

    def compare(self, moments: Moments, suspended: float, sent: int, lazy: bool) -> None:
        """After the container has begun to run on the target.  suspended: when it stood still.
        sent: bytes of the dump.  lazy: its memory was loaded lazily."""
        f = self.last
        if f is None:
            return
        sent_at = max(moments.sent, moments.dumped)
        actual = {
            "suspend": suspended - moments.suspend,
            "dump": moments.dumped - suspended,
            "transfer": sent_at - moments.dumped,
            "disk": moments.copied - suspended,
            "restore": moments.resumed - max(sent_at, moments.copied),
        }
        total = moments.total
        ratio = total / f.total if f.total > 0 else None
        self._report.event(
            "suspended",
            forecast=f.total,
            actual=total,
            ratio=ratio,
            forecast_steps=f.steps,
            actual_steps=actual,
            memory=sent,
        )
        self._report.info(
            f"Suspended for {total:.3f} s; {f.total:.3f} s were forecast"
            + (f" ({ratio:.2f} times as long)" if ratio is not None else "")
        )
        shown = samples_of(_sent(f.facts, sent, lazy), actual)
        host_rates.add(self._host.state_dir, self._runtime.name, self._request.host, shown)


class _Lately:
    """The geometric mean of what was measured in the last LATELY seconds: each measurement
    is short, and so not exact."""

    def __init__(self) -> None:
        self._values: list[tuple[float, float]] = []

    def add(self, value: float) -> float:
        now = time.monotonic()
        self._values = [(at, v) for at, v in self._values if now - at < LATELY]
        self._values.append((now, value))
        return geometric_mean(v for _, v in self._values)


def _sent(facts: Facts, sent: int, lazy: bool) -> Facts:
    """With what was really sent, and how it was restored."""
    if facts.later == "post-copy":  # its private memory is not in the dump
        return replace(facts, memory=sent + facts.deferrable)
    deferrable = min(facts.deferrable or sent, sent) if lazy else 0
    return replace(facts, memory=sent, deferrable=deferrable, later="lazy" if lazy else "")
