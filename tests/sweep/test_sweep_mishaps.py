"""Faults from outside a sweep: a deleted folder, a killed command, an unsuitable recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from milora_vl.base.errors import UserError
from milora_vl.recipe.schema import Recipe
from milora_vl.sweep import page
from milora_vl.sweep.__main__ import main
from milora_vl.sweep.cells import make_cells
from milora_vl.sweep.runner import Evaluation, Sweep, run_cells
from support.sweep_cells import RECIPE, finish_cell


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path, Recipe.parse(RECIPE), Evaluation("emoji", None, None))


def test_a_cell_whose_folder_was_removed_is_to_be_run_again(sweep: Sweep) -> None:
    """The page of the other cells is still written."""
    cells = make_cells(sweep.recipe, ["milora", "lora"], [1e-3], None, 1)
    (sweep.folder / "cells").mkdir()
    for cell in cells:
        finish_cell(sweep, cell, loss=1.0, right=[True, False], forgetting=0.1)
    shutil.rmtree(sweep.run_folder(cells[0]))
    assert [sweep.result(cell) is not None for cell in cells] == [False, True]
    _, table = page.write(page.of_sweep(sweep, cells, 1, "again"))
    assert [row[0] for row in table.rows] == ["lora"]


def test_a_killed_training_says_so(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = make_cells(sweep.recipe, ["milora"], [1e-3], None, 1)
    monkeypatch.setattr(Sweep, "training", lambda *_: ["-c", "import os; os.kill(os.getpid(), 9)"])
    run_cells(sweep, [cell], 1, retry=False, on_done=lambda *_: None)
    failure = sweep.failure(cell)
    assert failure is not None
    assert "memory ran out" in failure["said"]


def test_all_that_a_recipe_lacks_for_a_sweep_is_named_together(tmp_path: Path) -> None:
    given = ["--recipe", "tiny-test", "--methods", "mlora", "--lrs", "1e-3", "--output_dir", str(tmp_path / "out")]
    for more, lacks in (([], True), (["--suite", "emojis"], False)):
        with pytest.raises(UserError) as caught:
            main([*given, *more])
        problems = {problem.code: problem for problem in caught.value.problems}
        assert problems["sweep-unknown-method"].where == "--methods"
        assert problems["sweep-unknown-method"].hint.startswith("did you mean milora?")
        assert ("sweep.suite" in problems["sweep-recipe-incomplete"].message) is lacks
        assert ("eval-unknown-suite" not in problems) is lacks
    assert all(key in problems["sweep-recipe-incomplete"].message for key in ("data.path", "data.eval_path"))
    assert not (tmp_path / "out").exists()
