# SPDX-License-Identifier: Apache-2.0
"""The manual pages and the shells' completions, from the argument parsers.

    python3 man/generate.py FOLDER

writes them below FOLDER where they are installed below /usr.  setup.py does that
when it builds a wheel.  What a parser cannot know, examples say, stands in
man/COMMAND.inc beside this file (roff, in sections as argparse-manpage includes them).
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import time
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

from pyploop import __version__
from pyploop.cli.main import COMMANDS

HERE = Path(__file__).resolve().parent
COMPLETIONS = {
    "bash": "bash-completion/completions/pyploop",
    "zsh": "zsh/site-functions/_pyploop",
    "fish": "fish/vendor_completions.d/pyploop.fish",
}
"""Where each shell looks for it, below share."""
FILES = ("SOURCE TARGET", "FILE", "DEVICE", "IMAGE", "IMAGE|DEVICE|DiskDescriptor.xml")
FOLDERS = ("DIR", "FOLDER")


def parser_of(command: str) -> argparse.ArgumentParser:
    module = f"pyploop.cli.{command.replace('-', '_')}"
    parser: argparse.ArgumentParser = importlib.import_module(module).parser()
    return parser


def short(parser: argparse.ArgumentParser) -> str:
    """The first sentence of its description, as the NAME section wants it."""
    first = (parser.description or "").split(". ")[0].split(": ")[0].rstrip(".")
    return first[:1].lower() + first[1:]


def whole() -> argparse.ArgumentParser:
    """A parser of all commands: the program itself has none, so that it starts fast."""
    root = argparse.ArgumentParser(
        prog="pyploop",
        description="Copy a container's disk, or move a container, while it runs.",
        usage="pyploop [-v...] [--version] COMMAND ...",
    )
    root.add_argument("-v", action="count", help="one more level of messages; -vN for level N")
    root.add_argument("--version", action="version", version=__version__, help="print the version")
    commands = root.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        one = parser_of(name)
        commands.add_parser(
            name, parents=[one], add_help=False, help=short(one), description=one.description
        )
    return root


# ---- manual pages


def escaped(text: str) -> str:
    """For roff: a dash is one that can be typed."""
    return text.replace("\\", "\\e").replace("-", "\\-")


def synopsis(parser: argparse.ArgumentParser) -> str:
    """The usage, one line a form of it."""
    lines = parser.format_usage().removeprefix("usage: ").splitlines()
    forms = (_split(line.strip()) for line in lines)
    return "\n.br\n".join(f".B {escaped(prog)}\n{escaped(rest)}" for prog, rest in forms)


def _split(line: str) -> tuple[str, str]:
    """(the program, its arguments): options of the program come after its name."""
    words = line.split(" ")
    count = 2 if len(words) > 1 and words[1] in COMMANDS else 1
    return " ".join(words[:count]), " ".join(words[count:])


def page(parser: argparse.ArgumentParser, name: str, commands: str = "") -> str:
    """The manual page `name`(1)."""
    data = {
        "project_name": "pyploop",
        "version": __version__,
        "manual_title": "pyploop",
        "description": short(parser),
        # argparse-manpage's own is the day in the builder's time zone.
        "date": time.strftime(
            "%F", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
        ),
    }
    made = Manpage(parser, data)
    made.prog = name
    made.add_section("synopsis", "=", synopsis(parser))
    if commands:
        made.add_section("commands", "=", commands)
    made.parse_include(str(HERE / f"{name}.inc"))
    return str(made)


def overview(parser: argparse.ArgumentParser) -> str:
    """pyploop(1): the global options, and which commands there are."""
    bare = argparse.ArgumentParser(
        prog=parser.prog, usage=parser.usage, description=parser.description
    )
    commands = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action._choices_actions:
                commands += [f".TP\n.BR pyploop\\-{one.dest} (1)", escaped(str(one.help))]
        elif not isinstance(action, argparse._HelpAction):
            bare._add_action(action)
    return page(bare, "pyploop", "\n".join(commands))


def manual(folder: Path) -> None:
    one, five = folder / "share/man/man1", folder / "share/man/man5"
    for where in (one, five):
        where.mkdir(parents=True, exist_ok=True)
    (one / "pyploop.1").write_text(overview(whole()))
    for name in COMMANDS:
        (one / f"pyploop-{name}.1").write_text(page(parser_of(name), f"pyploop-{name}"))
    shutil.copy(HERE / "migrate.toml.5", five)


# ---- completions


def with_files(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Says which arguments are names of files and folders."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                with_files(one)
        elif action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return parser


def completions(folder: Path) -> None:
    for shell, name in COMPLETIONS.items():
        file = folder / "share" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(shtab.complete(with_files(whole()), shell))


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    os.environ["COLUMNS"] = "10000"  # argparse breaks no line of the usage
    folder = Path(sys.argv[1])
    manual(folder)
    completions(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
