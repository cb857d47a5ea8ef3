# SPDX-License-Identifier: Apache-2.0
"""The records of what failed migrations have left for the next one, as JSON in state_dir:
one for the files of a container (resumable_files.py), one for its trees (resumable_trees.py)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyploop.errors import OpenError
from pyploop.runtimes.volumes import KEPT
from pyploop.system import private_folder
from pyploop.undo.journal import Journal

Record = dict[str, Any]


@dataclass(frozen=True)
class RecordKind:
    """What a record is of: a list `parts`, each part with a `key` of `key_type`, and the
    path and the inode of what was kept.  fields: of the migration's journal, in it too;
    `migration` and `source` are among them."""

    schema: str
    suffix: str
    parts: str
    key: str
    key_type: type
    fields: tuple[str, ...]
    most: int = 0
    """Parts of one record; 0: any number."""

    def file(self, state_dir: str | Path, runtime: str, container: str) -> Path:
        return Path(state_dir) / f"{runtime}-{container}{self.suffix}"

    def file_of(self, log: Journal) -> Path:
        return self.file(log.path.parent, log.get("runtime"), log.get("container"))

    def read(self, file: Path) -> Record | None:
        """None when it is not there, or not what `add` wrote."""
        try:
            record = json.loads(private_folder.read_path(file))
            if record["schema"] != self.schema or not isinstance(record["source"]["id"], str):
                return None
            str(record["migration"]), str(record["source"]["name"])
            for part in record[self.parts]:
                if not (
                    isinstance(part[self.key], self.key_type) and isinstance(part["inode"], int)
                ):
                    return None
                if not os.path.isabs(part["path"]) or not part["path"].endswith(KEPT):
                    return None
        except (OSError, OpenError, ValueError, KeyError, TypeError):
            return None
        return dict(record)

    def add(self, log: Journal, part: Record) -> bool:
        """Record a part of this migration.  Durable when this returns; False when there
        would be too many."""
        file = self.file_of(log)
        record = self.read(file)
        if record is None or record["migration"] != log.get("migration"):
            record = {"schema": self.schema, **{n: log.get(n) for n in self.fields}, self.parts: []}
        # Again after a kill in the midst of this.
        others = [p for p in record[self.parts] if p[self.key] != part[self.key]]
        record[self.parts] = [*others, part]
        if self.most and len(record[self.parts]) > self.most:
            return False
        with private_folder.reopened(file.parent) as where:
            private_folder.replace(where, file.name, json.dumps(record).encode(), durable=True)
        return True
