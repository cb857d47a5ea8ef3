# SPDX-License-Identifier: Apache-2.0
"""load_sqlite.py FOLDER ROWS RATE: paced transactions in a WAL database, for ever.

Each changes a few rows and is synced (synchronous=FULL); the WAL is
checkpointed by sqlite's own default, every 1000 pages.
"""

from __future__ import annotations

import random
import sqlite3
import sys
import time
from pathlib import Path

ROW = 400
"""Bytes of text in a row; nine of them share a page."""
CHANGED = 4
"""Rows that a transaction changes."""


def connect(folder: Path, rows: int) -> sqlite3.Connection:
    """The database in the folder, made and filled with `rows` when it is new."""
    folder.mkdir(exist_ok=True)
    db = sqlite3.connect(folder / "db", isolation_level=None)
    db.execute("CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v TEXT)")
    if db.execute("SELECT count(*) FROM t").fetchone()[0] == 0:
        db.execute("BEGIN")
        db.executemany("INSERT INTO t VALUES (?, ?)", ((i, "x" * ROW) for i in range(rows)))
        db.execute("COMMIT")
    # Now, since a WAL would keep the size of the filling.
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    return db


def transactions(folder: Path, rows: int, per_second: float) -> None:
    """At a steady pace; of what it falls behind, 0.1 s is caught up with."""
    db = connect(folder, rows)
    # Not the numbers of the last run: sqlite leaves a row that is the same.
    rng = random.Random()
    due = time.monotonic()
    while True:
        db.execute("BEGIN IMMEDIATE")
        for _ in range(CHANGED):
            text = f"{rng.getrandbits(4 * ROW):x}"
            db.execute("UPDATE t SET v = ? WHERE id = ?", (text, rng.randrange(rows)))
        db.execute("COMMIT")
        due = max(due + 1 / per_second, time.monotonic() - 0.1)
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    transactions(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
