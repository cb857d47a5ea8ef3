# SPDX-License-Identifier: Apache-2.0
"""`pyploop trust`: which hosts may send running containers to this one."""

from __future__ import annotations

import argparse
import sys

from pyploop.cli.arguments import Parser
from pyploop.errors import PyploopError, VzExitCode, one_line
from pyploop.runtimes import config, trust_file
from pyploop.runtimes.config import HostConfig


class _Parser(Parser):
    exit_status = VzExitCode.USAGE


def parser() -> Parser:
    p = _Parser(
        prog="pyploop trust",
        allow_abbrev=False,
        description="Let a host send running containers, and containers of Podman, to this host: "
        "add it to [trust] of the configuration. It can become root here, because memory images "
        "are restored as root, and because Podman makes containers as their source describes "
        "them. Without SOURCE, show which hosts are trusted.",
    )
    p.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="the address from which its ssh connections come, or a network (ADDRESS/BITS)",
    )
    p.add_argument(
        "--key",
        action="store_true",
        help="SOURCE is the name that `pyploop agent --source` gives to an ssh key, not an address",
    )
    p.add_argument(
        "--places",
        action="append",
        default=[],
        metavar="DIR",
        help="also let the trusted hosts place runc containers in this folder that are not in the "
        "configuration",
    )
    p.add_argument("--remove", action="store_true", help="do not trust SOURCE any more")
    p.add_argument(
        "--config", metavar="FILE", help="configuration of this host (/etc/pyploop/migrate.toml)"
    )
    return p


def run(args: list[str], level: int) -> int:
    p = parser()
    o = p.parse_args(args)
    if o.source is None:
        if o.key or o.remove or o.places:
            p.error("give SOURCE, too")
    elif trust_file.is_address(o.source) == o.key and not o.remove:
        p.error(
            f"{o.source} is an address: leave out --key"
            if o.key
            else f"{o.source!r} is not an address: give the address from which its ssh connections "
            "come (a refused migration names it), or --key if `pyploop agent --source "
            f"{o.source}` belongs to its ssh key"
        )
    if o.remove and o.places:
        p.error("--remove and --places exclude each other")
    try:
        host = config.load(o.config) if o.source is None else _change(o, level)
    except PyploopError as e:
        print(f"pyploop trust: {e.with_hint()}", file=sys.stderr)
        return e.exit_code
    if o.source is None:
        _show(host)
    return 0


def _change(o: argparse.Namespace, level: int) -> HostConfig:
    def live(old: tuple[str, ...]) -> list[str]:
        others = [entry for entry in old if entry != o.source]
        return others if o.remove else [*old, *([] if o.source in old else [o.source])]

    def places(old: tuple[str, ...]) -> list[str]:
        return [*old, *(p for p in dict.fromkeys(o.places) if p not in old)]

    before, after = trust_file.change(
        o.config, {"live": live, **({"places": places} if o.places else {})}
    )
    if level < 0:
        return after
    changed = (before.trusted_live, before.trusted_places) != (
        after.trusted_live,
        after.trusted_places,
    )
    if o.remove:
        was = o.source in before.trusted_live
        print(one_line(f"{o.source} {'is not trusted any more' if was else 'was not trusted'}"))
    else:
        print(
            one_line(
                f"{o.source} may send running containers to this host, and so become root here; "
                f"to take that back: pyploop trust --remove {o.source}"
            )
        )
    print(one_line(f"{after.path}: {'written' if changed else 'it said so already'}"))
    return after


def _show(host: HostConfig) -> None:
    if not host.trusted_live:
        print("No host is trusted: none can send a running container")
    for entry in host.trusted_live:
        kind = "" if trust_file.is_address(entry) else " (name of an ssh key)"
        print(one_line(f"{entry}{kind} may send running containers"))
    for place in host.trusted_places if host.trusted_live else ():
        print(one_line(f"  they may place runc containers in {place}"))
