# SPDX-License-Identifier: Apache-2.0
"""`pyploop info`: what an image, a device or a DiskDescriptor.xml is.

The JSON object is documented in docs/internals/images.md; the text shows the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pyploop.api.inspecting import inspect
from pyploop.cli.arguments import Parser
from pyploop.errors import one_line
from pyploop.units import KIB, format_size

SCHEMA = "pyploop.info/1"
Report = dict[str, Any]


def parser() -> Parser:
    p = Parser(
        prog="pyploop info",
        allow_abbrev=False,
        description="Show what an image, a block device or a DiskDescriptor.xml is, "
        "and how it would be copied. Changes nothing.",
    )
    p.add_argument(
        "--json", action="store_true", help="print one JSON object (schema pyploop.info/1)"
    )
    p.add_argument("path", metavar="IMAGE|DEVICE|DiskDescriptor.xml")
    return p


def run(args: list[str], level: int) -> int:
    o = parser().parse_args(args)
    report = {"schema": SCHEMA, **asdict(inspect(o.path))}
    if o.json:
        print(json.dumps(report))
    else:
        print("\n".join(as_text(report)))
    return 0


def as_text(report: Report) -> list[str]:
    """The lines of the human form.  What stands in a file or in mountinfo is
    shown printable, so a name cannot forge a line."""
    lines: list[tuple[str, str]] = []
    version = report["version"]
    device = report["device"] or {}
    lines += [
        ("path", report["path"]),
        ("kind", report["kind"]),
        ("format", report["format"] + (f" v{version}" if version else "")),
        ("size", _size(report["size"])),
        ("file size", _size(report["file_size"])),
        ("cluster", _size(report["cluster"])),
        ("allocated", _size(report["allocated"])),
        ("data", _size(report["data"])),
        ("in use", {None: "", True: "yes", False: "no"}[report["in_use"]]),
    ]
    lines += _list("chain", [_delta(d, d is report["chain"][-1]) for d in report["chain"]])
    lines += [
        ("device", device.get("path") or ("none" if report["kind"] != "device" else "")),
        ("partition at", _size(device.get("partition_offset"))),
        ("backing file", device.get("backing_file") or ""),
        ("read from", device.get("io_mode", "")),
    ]
    if device:
        mounts = [f"{m['point']} ({m['fstype']} on {m['source']})" for m in report["mounts"]]
        lines += _list("mounts", mounts or ["none"])
    # What is frozen with the source stands among the mounts already.
    others = [u for u in report["users"] if u["state"] != "frozen"]
    lines += _list("used by", [f"{u['device']} {u['what']} ({u['state']})" for u in others])
    tracker = report["tracker"]
    lines.append(("tracker", f"{tracker['name'] or 'none'}: {tracker['why']}"))
    lines += [("note", note) for note in report["notes"]]
    shown = [(key, one_line(value)) for key, value in lines if value]
    width = max(len(key) for key, _ in shown) + 2
    return [f"{key + ':' if key else '':{width}}{value}" for key, value in shown]


def _list(key: str, items: list[str]) -> list[tuple[str, str]]:
    return [(key if i == 0 else "", item) for i, item in enumerate(items)]


def _delta(delta: Report, top: bool) -> str:
    version = f" v{delta['version']}" if delta["version"] else ""
    return (
        f"{delta['guid']} {delta['format']}{version}, {format_size(delta['allocated'])} "
        f"allocated{', in use' if delta['in_use'] else ''}, {delta['path']}"
        f"{' (top)' if top else ''}"
    )


def _size(n: int | None) -> str:
    if n is None:
        return ""
    return f"{n} bytes" if n < KIB else f"{format_size(n)} ({n} bytes)"
