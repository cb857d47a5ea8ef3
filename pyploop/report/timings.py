# SPDX-License-Identifier: Apache-2.0
"""The table of `-t`, in vzmigrate's layout: `  %20s: %6.2f` a row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MIGRATION_ROWS = (
    "Suspend + Dump",
    "Pcopy after suspend",
    "Copy dump file",
    "Undump + Resume",
)
TOTAL = "Total suspended time"


def table(
    rows: Iterable[tuple[str, float]],
    total: float,
    *,
    total_name: str = TOTAL,
    decimals: int = 2,
) -> str:
    """The rows (name, seconds), a rule, and the total."""
    lines = [_row(name, seconds, decimals) for name, seconds in rows]
    lines += [f"  {'':>20}  {'------':>6}", _row(total_name, total, decimals)]
    return "\n".join(lines)


def _row(name: str, seconds: float, decimals: int) -> str:
    return f"  {name:>20}: {seconds:6.{decimals}f}"


@dataclass(frozen=True)
class Moments:
    """Moments of one live migration, seconds on one monotonic clock.

    suspend: the stop command begins; copied: the disk's copy has returned;
    dumped: the dump is complete at the source; sent: it is on the target;
    resumed: the container runs on the target.
    """

    suspend: float
    copied: float
    dumped: float
    sent: float
    resumed: float

    def rows(self) -> list[tuple[str, float]]:
        """vzmigrate's four, whose sum is the time suspended.

        In vzmigrate the copy ends before the dump begins.  Here they overlap, so the dump's
        row is the time beyond the copy, and no row is negative.
        """
        pcopy = self.copied - self.suspend
        dumped = max(self.dumped, self.copied)
        sent = max(self.sent, dumped)
        seconds = (dumped - self.copied, pcopy, sent - dumped, self.resumed - sent)
        return list(zip(MIGRATION_ROWS, seconds, strict=True))

    @property
    def total(self) -> float:
        return self.resumed - self.suspend
