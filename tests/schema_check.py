# SPDX-License-Identifier: Apache-2.0
"""Checks lines of `--json` against the published schema, and against the types."""

from __future__ import annotations

import json
from pathlib import Path

import support

from pyploop.report import event_types

SCHEMA = support.ROOT / "pyploop/report/events.schema.json"
_FRAME = ("schema", "event", "time")


def check_lines(text: str) -> set[str]:
    """The events in these lines.  Each has the fields of its type and no other, and is
    valid by the schema, where there is a validator."""
    support.needs("module:jsonschema")
    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads(Path(SCHEMA).read_text()))
    found = set()
    for line in text.splitlines():
        record = json.loads(line)
        wrong = [e.message for e in validator.iter_errors(record)]
        assert wrong == [], line
        fields = {k: v for k, v in record.items() if k not in _FRAME}
        event_types.typed(record["event"], record["time"], fields)
        found.add(record["event"])
    return found
