"""The console script `milora` reaches every program, and helps with a wrong name."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

import pytest

from milora_vl.__main__ import main
from support.problems import raises_code


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [([], "", "no program given"), (["trian"], "", "did you mean train")],
)
def test_a_wrong_name_is_helped(words: list[str], code: str, said: str) -> None:
    with raises_code(code, says=said):
        main(words)


def test_the_console_script_is_installed() -> None:
    (script,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "milora"]
    assert script.load() is import_module("milora_vl.__main__").console
