"""The calls of a training walk down the list of modules in architecture.md, and none imports one above it."""

from __future__ import annotations

import importlib
import re
import sys
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

from milora_vl.train.command import main
from support.train_runs import training

PAGE = Path(__file__).resolve().parents[2] / "docs" / "contributing" / "architecture.md"
WALK = re.findall(r"^\d+\. `([\w.]+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_a_training_enters_the_modules_in_the_order_of_the_page(tiny_data: Path, tmp_path: Path) -> None:
    entered: dict[str, None] = {}
    modules = [importlib.import_module(name) for name in WALK]  # some call functions when they are imported
    assert len(modules) >= 10

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_flags & CO_OPTIMIZED:  # a function, and no import
            entered.setdefault(frame.f_globals.get("__name__", ""))

    sys.setprofile(see)
    try:
        assert main(training(tiny_data, tmp_path / "run", "--method", "milora", "--rank", "4", "--protect", "0")) == 0
    finally:
        sys.setprofile(None)
    assert [name for name in entered if name in WALK] == WALK


def test_no_module_of_the_walk_imports_one_above_it() -> None:
    for place, name in enumerate(WALK):
        values = vars(importlib.import_module(name)).values()
        imported = {getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in values}
        assert imported & set(WALK[:place]) == set(), name
