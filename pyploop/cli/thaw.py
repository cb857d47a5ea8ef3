# SPDX-License-Identifier: Apache-2.0
"""`pyploop thaw`: undo by hand what killed copies left, from their journals."""

from __future__ import annotations

import argparse
import sys
import time

from pyploop.cli.arguments import Parser
from pyploop.diskcopy import undo_kinds  # noqa: F401 - registers how entries are undone
from pyploop.errors import BusyError, DeviceControlError, OpenError, PyploopError, one_line
from pyploop.undo.journal import Record, describe, folder, records, replaying


def parser() -> Parser:
    p = Parser(
        prog="pyploop thaw",
        allow_abbrev=False,
        description="Undo what copies have left that were killed together with their watchdog: "
        "thaw file systems and cgroups, resume containers, remove throttles and unfinished "
        "targets. Without arguments, list what is left. "
        "What belongs to a running copy is never touched.",
    )
    p.add_argument("--list", action="store_true", help="list the journals and their entries")
    p.add_argument("--all", action="store_true", help="undo everything that dead copies have left")
    p.add_argument(
        "--forget",
        action="store_true",
        help="remove the named journals without undoing anything; for what cannot be undone",
    )
    p.add_argument("ids", nargs="*", metavar="ID", help="journals to undo, as --list names them")
    return p


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_args(args)
    if o.ids and (o.all or o.list):
        p.error("give IDs, --all, or --list, and only one of them")
    if o.forget and not o.ids:
        p.error("--forget needs the IDs of the journals")
    try:
        if not (o.ids or o.all):
            return _list(records(ignored=_complain))
        with replaying():
            chosen = _chosen(o, records(ignored=_complain))
            return _forget(chosen, level) if o.forget else _undo(chosen, level)
    except PyploopError as e:
        print(f"pyploop thaw: {e.with_hint()}", file=sys.stderr)
        return e.exit_code


def _complain(text: str) -> None:
    print(f"pyploop thaw: {one_line(text)}", file=sys.stderr)


def _list(found: list[Record]) -> int:
    for record in found:
        pid = record.owner()
        whose = "left behind" if pid is None else f"belongs to process {pid}"
        started = time.strftime("%F %T", time.localtime(record.fields.get("started", 0)))
        print(one_line(f"{record.id}  {record.what}, {started}, {whose}"))
        for entry in record.entries:
            why = f" (failed: {entry['error']})" if "error" in entry else ""
            print(one_line(f"    {describe(entry)}{why}"))
    return 0


def _chosen(o: argparse.Namespace, found: list[Record]) -> list[Record]:
    if o.all:
        return [r for r in found if r.owner() is None]
    by_id = {r.id: r for r in found}
    for name in o.ids:
        if name not in by_id:
            raise OpenError(
                f"there is no journal {name} in {folder()}",
                hint="`pyploop thaw` lists the journals",
            )
    return [by_id[name] for name in dict.fromkeys(o.ids)]


def _forget(chosen: list[Record], level: int) -> int:
    """BusyError when one belongs to a running copy; those after it are not removed then."""
    for record in chosen:
        entries = record.entries
        record.forget()
        if level >= 0:
            left = ", ".join(describe(e) for e in reversed(entries)) or "nothing was left"
            print(f"{record.id}  removed, and not undone: {left}")
    return 0


def _undo(chosen: list[Record], level: int) -> int:
    """The exit code: that of the last failure."""
    code = 0
    for record in chosen:
        entries = record.entries
        try:
            failed = record.replay()
        except BusyError as e:
            failed, entries, code = [str(e)], [], e.exit_code
        else:
            code = DeviceControlError.exit_code if failed else code
        for words in failed:
            _complain(words)
        if failed and entries:
            _complain(
                f"{record.id} stays, so that it can be tried again; if it can never succeed, "
                f"undo it by hand and then run: pyploop thaw --forget {record.id}"
            )
        if not failed and level >= 0:
            done = ", ".join(describe(e) for e in reversed(entries)) or "nothing was left"
            print(one_line(f"{record.id}  {done}"))
    return code
