# SPDX-License-Identifier: Apache-2.0
"""The approach to the freeze: the target durable, the freeze rehearsed, and one more
round, until a freeze fits what was asked for."""

from __future__ import annotations

import itertools
import time

from pyploop.diskcopy.context import Context
from pyploop.diskcopy.freeze_policy import Decision, Forecast, forecast
from pyploop.diskcopy.measurements import Measurements
from pyploop.diskcopy.precopy import RETRY, PreCopy
from pyploop.errors import LoopError
from pyploop.freeze.deadline import Limits
from pyploop.units import MIB

APPROACHES = 3
"""Target syncs before the freeze, when no --max-freeze asks for more."""
UNSYNCED = 4 * MIB
"""Bytes sent since the target's last sync that are left to the freeze."""


class Approach:
    """From the last round of the pre-copy to the stop command."""

    def __init__(self, context: Context, measurements: Measurements, precopy: PreCopy) -> None:
        self._context, self._measurements, self._precopy = context, measurements, precopy
        self._sent_at_sync = 0

    def prepare_freeze(self) -> None:
        """Sync the target, start the watchdog, rehearse the freeze, and do rounds until
        a freeze fits what was asked for.  Does nothing when there is nothing to freeze
        or stop.  LoopError: no freeze fitted."""
        c, measurements = self._context, self._measurements
        if not c.stops:
            self._precopy.look_around(last=True)
        if not c.stops:
            return
        c.session.prepare()
        for attempt in itertools.count(1):
            how = self.sync_target()
            # What was dirtied meanwhile must not wait for the freeze.
            self._precopy.round(last=True)
            if c.out.framing.exact:
                break
            self._precopy.iterate(last=True)
            if how == "acknowledged" and self._unsynced > UNSYNCED and attempt < APPROACHES:
                continue
            with c.recorder.step("freeze"):
                measurements.freeze_time = c.mounts.warm_up()
            if self._fits():
                break
            c.mounts.cool_down()
            measurements.freeze_time = None  # the next rehearsal measures it anew
            c.source_pump.pause(RETRY)
        if c.source_pump.proof is not None:
            c.source_pump.proof.root()  # so that little of the tree is left for the freeze
        f = self._forecast()
        self._check_scan(f)
        c.summary.predicted = f.total
        c.summary.target_unsynced = self._unsynced
        c.summary.max_freeze = c.options.policy.max_freeze

    @property
    def _unsynced(self) -> int:
        """Bytes sent since the target's last sync."""
        return self._context.source_pump.stats.data - self._sent_at_sync

    def _check_scan(self, f: Forecast) -> None:
        """A scan compares everything inside the freeze.  When that is known to be too
        long it is refused here, before the source is frozen in vain."""
        c = self._context
        limit = c.options.freeze_limit
        if not c.tracker.compares_everything or not c.mounts or not limit:
            return
        if f.total > Limits.of(limit).own:
            c.mounts.cool_down()
            raise LoopError(
                f"a scan of {c.source.path} would keep it frozen for about {f.total:.0f} s, and "
                f"--freeze-limit allows {limit:g} s; nothing was frozen, no target was made",
                path=c.source.path,
                hint="raise --freeze-limit, or use a tracker that follows the writes "
                "(--tracker bpf, as root)",
            )

    def sync_target(self) -> str:
        """Make what was sent durable at the target.  Returns how that is known
        (`Output.sync`)."""
        c, measurements = self._context, self._measurements
        c.report.event("phase", phase="sync", bytes=None)
        sent, unsynced = c.source_pump.stats.data, self._unsynced
        start, cut = time.monotonic(), c.source_pump.cut_seconds
        with c.recorder.step("target sync"):
            how = self._ask_to_sync(waiting=not measurements.target_was_synced)
        seconds = time.monotonic() - start - (c.source_pump.cut_seconds - cut)
        if how in ("acknowledged", "local"):
            measurements.add_target_sync(unsynced, seconds)
        else:
            measurements.add_target_sync(0, 0.0)
        self._sent_at_sync = sent
        c.report.info(f"Target synced before the freeze ({how}, {seconds:.3f} s)")
        if c.out.heard is not None:
            # Nothing was sent since: this measures the round trip, and the clocks.
            start = time.monotonic()
            self._ask_to_sync(waiting=False)
            measurements.add_target_sync(0, time.monotonic() - start)
        return how

    def _ask_to_sync(self, waiting: bool) -> str:
        c = self._context
        how = c.out.sync(c.source_pump.pump, waiting=waiting, start=c.source_pump.first_bytes(4))
        c.recorder.remote(c.out.heard)
        return how

    def _forecast(self) -> Forecast:
        return forecast(self._measurements.measured(), self._context.tracker.pending())

    def _fits(self) -> bool:
        """The last decision before the stop command."""
        policy, f = self._context.options.policy, self._forecast()
        if policy.max_freeze is None or f.total <= policy.max_freeze:
            return True
        why = f"{f.total * 1000:.0f} ms expected, {policy.max_freeze * 1000:.0f} ms allowed"
        if self._measurements.elapsed < policy.deadline:
            self._context.report.info(f"No freeze yet: {why}")
            return False
        self._precopy.give_up(Decision(policy.on_deadline, f"no moment fitted ({why})", f))
        return True
