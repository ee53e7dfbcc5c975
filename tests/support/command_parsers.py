"""The parser of each program, caught before it parses."""

from __future__ import annotations

from typing import Any

import pytest

from milora_vl.__main__ import main
from milora_vl.common.cli.parser import CommandParser


class Parser(BaseException):
    """Carries a program's parser out of it."""


def parser_of(words: tuple[str, ...]) -> CommandParser:
    """The parser that a program makes, before it parses."""

    def caught(self: CommandParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parser(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CommandParser, "parse_known_args", caught)
        try:
            main([*words, "x.py"])
        except Parser as found:
            return found.args[0]
    raise AssertionError(f"{words} parses nothing")
