"""The calls of a training walk down the list of modules in docs/architecture.md, and none imports one above it."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from milora_vl.train.command import main
from support.train_runs import training

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
WALK = re.findall(r"^\d+\. `([\w.]+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_a_training_enters_the_modules_in_the_order_of_the_page(tiny_data: Path, tmp_path: Path) -> None:
    entered: dict[str, None] = {}

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.setdefault(frame.f_globals.get("__name__", ""))

    sys.setprofile(see)
    try:
        assert main(training(tiny_data, tmp_path / "run", "--method", "milora", "--rank", "4", "--protect", "0")) == 0
    finally:
        sys.setprofile(None)
    assert [name for name in entered if name in WALK] == WALK


def test_no_module_of_the_walk_imports_one_above_it() -> None:
    assert len(WALK) > 10
    for place, name in enumerate(WALK):
        module = importlib.import_module(name)
        values = vars(module).values()
        imported = {getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in values}
        assert not imported & set(WALK[:place]), name
