"""Several programs under one name: `--help` lists them, the first argument selects one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from milora_vl.common.cli.command_line import suggest
from milora_vl.common.errors import UserError

CODES = "exit codes: 0 done, 1 the run failed or errors were found, 2 bad usage, 130 interrupted\n"


@dataclass(frozen=True, slots=True)
class Menu:
    """`groups` maps heading and name to a module with a `main` and a description.

    A module is imported only when it is selected. Names in `menus` are menus themselves; their programs are listed.
    """

    prog: str
    about: str
    groups: Mapping[str, Mapping[str, tuple[str, str]]]
    examples: str
    word: str = "COMMAND"
    menus: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, str]:
        return {name: module for programs in self.groups.values() for name, (module, _) in programs.items()}

    def usage(self) -> str:
        listed = {heading: dict(self._lines(programs)) for heading, programs in self.groups.items()}
        width = max(len(name) for lines in listed.values() for name in lines)
        groups = "\n\n".join(
            "\n".join([f"{heading}:", *(f"  {name:<{width}}  {about}" for name, about in lines.items())])
            for heading, lines in listed.items()
        )
        see = f"options of each: {self.prog} {self.word} --help"
        return f"usage: {self.prog} {self.word} ...\n\n{self.about}\n\n{groups}\n\n{see}\n\n{self.examples}\n{CODES}"

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run one program and return its exit code; raises `UserError` for an unknown name."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        kind = self.word.lower()
        if not arguments:
            sys.stderr.write(self.usage() + "\n")
            raise UserError(
                f"no {kind} given", code="command-missing", hint=f"expected one of: {', '.join(self.modules)}"
            )
        name = arguments[0]
        if name in ("-h", "--help"):
            sys.stdout.write(self.usage())
            return 0
        if name not in self.modules:
            inner = {words.split()[-1]: words for lines in self.groups.values() for words, _ in self._lines(lines)}
            near = [inner[name]] if name in inner else suggest(name, self.modules)
            suggestion = f"\ndid you mean {near[0]}?" if near else ""
            raise UserError(
                f"unknown {kind}: {name}",
                code="command-unknown",
                hint=f"expected one of: {', '.join(self.modules)}{suggestion}",
            )
        return int(import_module(self.modules[name]).main(arguments[1:]))

    def _lines(self, programs: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for name, (module, about) in programs.items():
            if name not in self.menus:
                yield name, about
                continue
            for inner in import_module(module).MENU.groups.values():
                yield from ((f"{name} {program}", text) for program, (_, text) in inner.items())
