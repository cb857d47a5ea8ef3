# SPDX-License-Identifier: Apache-2.0
"""The agent on the target of a migration: its channels, and its failures as those of
vzmigrate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pyploop.errors import MigrateError, PyploopError, VzExitCode
from pyploop.migration import deadlines, image_channels
from pyploop.migration.image_channels import ImageWriter
from pyploop.migration.source import lane_supply
from pyploop.migration.source.bulk_lanes import BulkLanes
from pyploop.migration.source.lane_supply import LaneSupply
from pyploop.report.events import Reporter
from pyploop.runtimes.checks import ChecksFailedError, Failed
from pyploop.transport import deadlines as connection
from pyploop.transport import hints
from pyploop.transport.client import Client, OnEvent
from pyploop.transport.lane import Lane
from pyploop.transport.mux import Mux
from pyploop.wire import channels, messages
from pyploop.wire import mux as wire

NO_PROGRAM = 127
"""The exit status of a shell that finds no such program."""
BULK_FIRST = 512
"""Numbers of lanes from which on they are those of the second connection."""


class Remote(Client):
    """The connection to the agent of a migration.  MigrateError(4): there is none."""

    what = "the migration"
    install_ssh = "install it, or set remote.ssh in migrate.toml"
    _channel = 0
    """The last number of a channel that was given."""
    lanes: LaneSupply | None = None
    """Further connections for the disks; None: they go over this one."""
    _bulk: BulkLanes | None = None
    """The connection over several lanes, for memory and directories.  None: as above."""

    def __init__(
        self,
        host: str,
        ssh: Sequence[str],
        options: Sequence[str],
        agent: Sequence[str],
        on_event: OnEvent = lambda *_: None,
    ) -> None:
        super().__init__(host, ssh, options, agent, on_event, on_dead=self._cut_lanes)
        self._words = tuple(ssh), tuple(agent)

    # ---- lanes

    def begin_lanes(self, report: Reporter, disks: int, data: int, bulk: int) -> None:
        """After the checks: open lanes, if the agent knows them.  data: bytes of all disks.
        bulk: bytes of what comes by channels, memory and directories."""
        if "lanes" not in self.capabilities:
            report.info(
                f"All data go over one connection: pyploop {self.version} on {self.host} is too "
                "old for lanes"
            )
            return
        round_trip = min(self._round_trip() for _ in range(2))
        if disks:
            self.lanes = LaneSupply(self.host, self._lane, round_trip, report)
            self.lanes.start(lane_supply.wanted_ahead(disks, data, round_trip))
        if wanted := lane_supply.wanted_ahead(0, bulk, round_trip):
            supply = LaneSupply(self.host, self._lane, round_trip, report, first=BULK_FIRST)
            supply.start(wanted)
            self._bulk = BulkLanes(self.host, supply, self._use_for_bulk, report)

    def _use_for_bulk(self, number: int, gone: Callable[[], bool]) -> None:
        self.call("use", deadlines.REQUEST, gone, number=number, disk=None)

    def complete_lanes(self) -> None:
        """Wait until those lanes are there that are opened ahead."""
        if self._bulk is not None:
            self._bulk.complete(connection.CONNECT)

    def settle_lanes(self) -> None:
        """Before the freeze: those that are open stay, and no other is opened."""
        if self.lanes is not None:
            self.lanes.stop()
        if self._bulk is not None:
            self._bulk.stop()

    def _round_trip(self) -> float:
        start = time.monotonic()
        self.call("clock", deadlines.REQUEST)
        return time.monotonic() - start

    def _lane(self, number: int, gone: Callable[[], bool]) -> Lane:
        """Open one: the agent's own command, which an ssh key may be bound to, serves it.
        PyploopError; CancelledError: `gone` says that it is not needed any more."""
        token = self.call("lane", deadlines.REQUEST, gone, number=number)["token"]
        ssh, agent = self._words
        return Lane(self.host, ssh, self.options, agent).join(token, gone)

    def _cut_lanes(self, cause: PyploopError) -> None:
        """The connection has ended, and what goes by lanes ends with it."""
        if self.lanes is not None:
            self.lanes.cut()
        if self._bulk is not None:
            self._bulk.cut(cause)

    def close(self) -> None:
        super().close()
        if self.lanes is not None:
            self.lanes.close()
        if self._bulk is not None:
            self._bulk.close()

    def _way(self) -> tuple[Mux, dict[str, Any]]:
        """The connection for a channel with much data, and what its request says of it."""
        mux = None if self._bulk is None else self._bulk.mux(connection.CONNECT)
        return (self._live(), {}) if mux is None else (mux, {"bulk": True})

    # ---- errors

    def not_a_host(self, text: str) -> MigrateError:
        return MigrateError(VzExitCode.USAGE, text)

    def unreachable(self, text: str, hint: str | None = None) -> MigrateError:
        return MigrateError(VzExitCode.CANNOT_CONNECT, text, hint=hint)

    def no_agent(self, why: str, printed: str, status: int | None) -> MigrateError:
        text = f"no pyploop agent on {self.host}: {why}" + (f" ({printed})" if printed else "")
        if status == NO_PROGRAM:
            return self.unreachable(
                text,
                f"install pyploop on {self.host}. If it is there, write its path into remote.agent "
                "in migrate.toml on this host",
            )
        return self.unreachable(
            text,
            f"`ssh -o BatchMode=yes {self.host} pyploop agent </dev/null` must print a line "
            "PYPLOOP-AGENT …, and ask nothing",
        )

    def failed_there(self, error: Any) -> MigrateError:
        if found := messages.failed_checks(error):
            return ChecksFailedError(
                [Failed(name, code, text, hint, self.host) for name, code, text, hint in found]
            )
        code, text = messages.failure(error)
        text, hint = hints.parted(text)
        # Marked as the target's words, both of them: it may be hostile.
        return MigrateError(code, f"{self.host}: {text}", hint=hint and f"{self.host}: {hint}")

    def checked(self, op: str, value: Any) -> dict[str, Any]:
        return messages.answer(op, value)

    # ---- channels

    def open_images(self, stall: float, rate: int = 0) -> tuple[dict[str, Any], ImageWriter]:
        """(arguments of the request, the sender) for memory images; see open_channel."""
        number = self._next_channel()
        mux, args = self._way()
        args["channel"], window = number, wire.WINDOW
        if "window" in self.capabilities:
            window = wire.BULK_WINDOW if "bulk" in args else wire.IMAGE_WINDOW
            args["window"] = window
        return args, image_channels.open_writer(mux, number, window, stall, rate)

    def open_tree(self) -> tuple[dict[str, Any], int]:
        """(arguments of the request, a descriptor, which the caller closes) for one pass over
        a directory; else as open_channel."""
        number = self._next_channel()
        mux, args = self._way()
        if args and mux.opened >= channels.BULK_TREES:
            mux, args = self._live(), {}
        args["channel"] = number
        return args, mux.open(number)

    def open_channel(self) -> tuple[int, int]:
        """Returns (the number for a request, a descriptor, which the caller closes).
        MigrateError when the agent takes no more channels."""
        number = self._next_channel()
        return number, self._live().open(number)

    def _next_channel(self) -> int:
        if self.channels_left < 1:
            raise MigrateError(
                VzExitCode.COPY_FAILED,
                f"pyploop {self.version} on {self.host} takes no more than {self._channel} "
                "channels in one migration",
                hint="install a newer pyploop there, or migrate fewer disks and trees at once",
            )
        self._channel += 1
        return self._channel

    @property
    def channels_left(self) -> int:
        """How many channels can still be opened.  No number is used twice."""
        last = channels.LAST if "channels" in self.capabilities else channels.LAST_OLD
        return last - self._channel

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """A failure in the body that comes of the dead connection also says why that is
        dead."""
        try:
            yield
        except MigrateError:
            raise
        except (PyploopError, OSError) as e:
            cause = self._mux.failure if self._mux is not None else None
            if cause is None and self._bulk is not None:
                cause = self._bulk.failure
            if cause is None or str(cause) in str(e):
                raise
            raise MigrateError(VzExitCode.COPY_FAILED, f"{self.host}: {cause} ({e})") from e
