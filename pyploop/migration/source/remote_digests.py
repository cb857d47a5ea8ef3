# SPDX-License-Identifier: Apache-2.0
"""Digests of the target's resumable files, requested over the agent's connection."""

from __future__ import annotations

from collections.abc import Sequence

from pyploop.diskcopy.delta import Reused
from pyploop.diskcopy.digests import Reader
from pyploop.migration import deadlines
from pyploop.migration.source.agent_client import Remote
from pyploop.report.events import Reporter
from pyploop.units import format_size


class RemoteDigests:
    """The digests of several files, one after the other; a context manager."""

    def __init__(self, remote: Remote, files: Sequence[tuple[str, int]], stall: float) -> None:
        """files: (name, size on the source)."""
        self._host = remote.host
        self.names = [name for name, _ in files]
        number, fd = remote.open_channel()
        self.reader = Reader(fd, stall)
        try:
            remote.call(
                "digests", deadlines.REQUEST, channel=number, files=[list(f) for f in files]
            )
        except BaseException:
            self.reader.close()
            raise

    def log(self, report: Reporter, name: str, found: Reused) -> None:
        """Report how much of the file need not be sent."""
        report.event("reused", name=name, held=found.kept, same=found.same)
        report.info(
            f"{self._host} has kept {format_size(found.kept)} of {name} from an earlier "
            f"migration; {format_size(found.same)} of it are unchanged and are not sent again"
        )

    def __enter__(self) -> RemoteDigests:
        return self

    def __exit__(self, *exc: object) -> None:
        self.reader.close()
