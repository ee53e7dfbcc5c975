"""What a sweep works out before its first cell runs: its recipe, and the cost of one cell by a dry run."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from milora_vl.base.errors import Problem, UserError
from milora_vl.cli.command_line import amount
from milora_vl.forecast import dry_run
from milora_vl.recipe import command_line
from milora_vl.recipe.recipe_file import read_recipe
from milora_vl.recipe.schema import Recipe
from milora_vl.sweep.cells import Cell, recipe_of


def recipe_named(name: str) -> Recipe:
    """Return a recipe by name or path. Raises UserError with its problems."""
    file = read_recipe(name)
    return Recipe.parse(file.content, file.source, file.lines)


def cost(recipe: Recipe, cell: Cell, left: int, jobs: int) -> str:
    """Return the cost of one cell as text. Raises UserError with the problems of the cell if it cannot run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{cell.name}.yaml")
        file.write_text(recipe_of(recipe, cell).to_yaml(), encoding="utf-8")
        # The real output folder may hold a run to resume.
        request = command_line.parse(["--recipe", str(file), "--dry-run", "--output_dir", str(Path(folder, cell.name))])
        try:
            run = dry_run.outlook(request)
        except UserError as error:
            first = Problem("a cell cannot run", "sweep-cell-cannot-run", cell.name, "correct the recipe of the sweep")
            rest = [replace(problem, where=problem.where.removeprefix(f"{folder}/")) for problem in error.problems]
            raise UserError(problems=[first, *rest]) from None
    words = f" of training one of {amount(left, 'cell')}, {jobs} at a time (measured after the first cell):\n  "
    return words + "\n  ".join([*(f"warning: {warning}" for warning in run.warnings), *run.costs.lines])
