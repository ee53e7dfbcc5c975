"""`python -m milora_data COMMAND`: validate, convert, look at and count a data set; make the demo's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from milora_data.command import run, suggest
from milora_data.errors import UserError

# Each command is the `main` of the module of its name, imported only when it is asked for.
COMMANDS = {
    "check": "find what is broken in a data set, and write it without",
    "stats": "count records, pictures, turns and lengths",
    "show": "print records as they are learnt, with the mask",
    "convert": "make LLaVA JSON of another format",
    "emoji": "make the demo's data set",
}


def usage() -> str:
    """Return the text of `--help`."""
    lines = "\n".join(f"  {name:<9} {about}" for name, about in COMMANDS.items())
    return (
        "usage: python -m milora_data COMMAND ...\n\n"
        f"Data for LLaVA-style training.\n\n{lines}\n\n"
        "options of a command: python -m milora_data COMMAND --help\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        raise UserError("no command given\n" + usage().rstrip())
    name = arguments[0]
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if name not in COMMANDS:
        near = suggest(name, COMMANDS)
        hint = f"\ndid you mean {near[0]} ?" if near else ""
        raise UserError(f"unknown command: {name}\nexpected one of: {', '.join(COMMANDS)}{hint}")
    return int(import_module(f"milora_data.{name}").main(arguments[1:]))


if __name__ == "__main__":
    run(main)
