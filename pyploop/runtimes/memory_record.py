# SPDX-License-Identifier: Apache-2.0
"""What is on disk about memory that comes while a container runs: a file in `state_dir` for
each container, which processes of ours write while they work (LazyRecord, PageRecord)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pyploop.errors import OpenError
from pyploop.system import kernel, private_folder
from pyploop.undo import journal

POLL = 0.05


@dataclass(frozen=True)
class MemoryRecord:
    """One, as it was when it was read."""

    SCHEMA: ClassVar[str]
    SUFFIX: ClassVar[str]
    OF: ClassVar[str]
    """What it is a record of, for messages."""
    FIRST: ClassVar[str]
    """The state that it begins with."""

    path: Path
    fields: dict[str, Any]

    @classmethod
    def path_of(cls, state_dir: str | Path, runtime: str, container: str) -> Path:
        return Path(state_dir) / f"{runtime}-{container}{cls.SUFFIX}"

    @classmethod
    def create(cls, path: Path, **fields: Any) -> Self:
        """A new one, in place of an older one; the processes complete it."""
        record = {**fields, "schema": cls.SCHEMA, "boot": kernel.boot_id(), "state": cls.FIRST}
        record["started"] = time.time()
        with private_folder.reopened(path.parent) as folder:
            private_folder.replace(folder, path.name, json.dumps(record).encode())
        return cls(path, record)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None when there is none.  OpenError when it is not this user's alone."""
        try:
            fields = json.loads(private_folder.read_path(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            raise OpenError(f"cannot read {path}: {e}") from e
        if not isinstance(fields, dict) or fields.get("schema") != cls.SCHEMA:
            raise OpenError(f"{path} is not a record of {cls.OF}")
        return cls(path, fields)

    @classmethod
    def all_in(cls, state_dir: str | Path) -> Iterator[Self]:
        """OpenError when one cannot be read."""
        for path in sorted(Path(state_dir).glob(f"*{cls.SUFFIX}")):
            if record := cls.read(path):
                yield record

    @property
    def container(self) -> str:
        return str(self.fields.get("container", "?"))

    @property
    def state(self) -> str:
        return str(self.fields.get("state", self.FIRST))

    @property
    def why(self) -> str:
        """How what was at work has died; else empty."""
        return str(self.fields.get("why", ""))

    @property
    def of_this_boot(self) -> bool:
        return bool(self.fields.get("boot") == kernel.boot_id())

    def process(self, which: str) -> int:
        """PID of one of its processes, by its key; 0 when it has ended."""
        known = self.fields.get(which)
        if not self.of_this_boot or not isinstance(known, dict):
            return 0
        pid = int(known.get("pid") or 0)
        return pid if pid and journal.start_time(pid) == known.get("start") else 0
