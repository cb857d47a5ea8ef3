# SPDX-License-Identifier: Apache-2.0
"""What the target has kept of files here, asked for over the one connection."""

from __future__ import annotations

from collections.abc import Sequence

from pyploop.diskcopy.delta import Reused
from pyploop.diskcopy.digests import Reader
from pyploop.migration import deadlines
from pyploop.migration.source.agent_client import Remote
from pyploop.report.events import Reporter
from pyploop.units import format_size


class RemoteDigests:
    """The digests of one file after the other; a context manager."""

    def __init__(self, remote: Remote, files: Sequence[tuple[str, int]], stall: float) -> None:
        """files: (name, size here)."""
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
        """What came of it."""
        report.event("reused", name=name, held=found.kept, same=found.same)
        report.info(
            f"{self._host} had kept {format_size(found.kept)} of {name}: {format_size(found.same)} "
            "of these are unchanged and are not sent"
        )

    def __enter__(self) -> RemoteDigests:
        return self

    def __exit__(self, *exc: object) -> None:
        self.reader.close()
