"""`python -m milora_vl.sweep`: train methods x learning rates x ranks x seeds of one recipe and compare them fairly."""

from __future__ import annotations

import argparse
import io
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from milora_data.keys import FileKeys, data_key, digest, file_key, record_key
from milora_eval.answers.questions import questions_key, require_questions
from milora_vl.common.atomic_write import locked, read_json, write_json, write_text
from milora_vl.common.cli.console import amount, next_step, run
from milora_vl.common.cli.parser import Command, flag, option, positive, shared
from milora_vl.common.cli.table import Table, show
from milora_vl.common.errors import Problem, UserError, collected
from milora_vl.common.evaluator_protocol import QuestionSet
from milora_vl.models.base import at_revision
from milora_vl.sweep import page
from milora_vl.sweep.cells import Cell, make_cells, recipe_of
from milora_vl.sweep.runner import Sweep, run_sweep, usable_cores
from milora_vl.train.data import calibration_records, data_of, read_records
from milora_vl.train.settings import ADAPTERS, Recipe, read_recipe


def _words(text: str) -> list[str]:
    words = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not words:
        raise argparse.ArgumentTypeError("expected at least one name")
    return words


def _numbers(kind: type[float] | type[int]) -> type:
    def parse(text: str) -> list[float]:
        try:
            numbers = [kind(word) for word in _words(text)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers with commas, got {text!r}") from None
        if min(numbers) <= 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
        return sorted(set(numbers))

    return parse  # type: ignore[return-value]


COMMAND = Command(
    "milora_vl.sweep",
    "Compare methods, each at its own best learning rate.",
    f"""\
methods: {", ".join(ADAPTERS)}, full (as in milora_vl.train);
         milora-paper (MiLoRA without protected inputs), and the variants in sweep.variants of the recipe
Each cell is one training, an evaluation on the suite and a measurement of forgetting. The validation loss
(data.eval_path of the recipe) selects the learning rate of each method; the suite gives its reported score.
Run the same command again to resume.

examples:
  python -m milora_vl.sweep --recipe smol-llava-demo --methods milora,lora --lrs 1e-4,3e-4,1e-3 --seeds 3
  python -m milora_vl.sweep --recipe r.yaml --methods milora,lora --lrs 1e-4,3e-4 --ranks 8,32 --seeds 3 --plan
""",
    inputs=(
        option("--recipe", required=True, metavar="RECIPE", help="name or file, as for milora_vl.train"),
        shared("suite", about="suite, or FILE.json with own questions (default: sweep.suite of the recipe)"),
        option("--data", metavar="FOLDER", help="folder with the files of the suite"),
    ),
    settings=(
        option(
            "--methods",
            type=_words,
            required=True,
            metavar="a,b",
            help="methods; the others are compared with the first",
        ),
        option("--lrs", type=_numbers(float), required=True, metavar="x,y", help="learning rates"),
        option("--ranks", type=_numbers(int), metavar="r,s", help="ranks (default: set by the recipe)"),
        option("--seeds", type=positive, default=3, help="number of seeds, starting at the recipe's seed (default: 3)"),
        shared("limit", about="number of items per benchmark"),
        option(
            "--jobs", type=positive, help="number of parallel cells (default: one per GPU, or one per core up to 4)"
        ),
        flag("--plan", "check the recipe of each method, show the number of cells, then stop"),
        shared("retry"),
    ),
    outputs=(
        shared("output_dir", about="output folder (default: runs/sweep-RECIPE)"),
        shared("format"),
    ),
)


# Keys of a recipe that name what is compared by its content.
KNOWN_BY_CONTENT: dict[str, Any] = {
    **dict.fromkeys(("model", "adapter", "after", "projector_weights"), True),
    "data": {"path", "eval_path", "image_folder"},
    "calibration": {"data", "image_folder"},
    "parts": {"vision_tower", "vision_weights"},
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    options = COMMAND.parse(words)
    recipe = Recipe.parse(*read_recipe(options.recipe))
    suite = options.suite or recipe.sweep.suite or next(iter(recipe.eval.suites), "")
    data = data_of(suite, recipe, options.data or recipe.sweep.data or recipe.eval.data)
    folder = options.output_dir or Path("runs") / f"sweep-{Path(options.recipe).stem}"
    sweep = Sweep(folder, recipe, QuestionSet(suite, data, options.limit or recipe.sweep.limit))
    cells = _checked_cells(options, sweep)
    known = _require_same_sweep(sweep)
    jobs = options.jobs or _jobs(len(cells))
    done = [cell for cell in cells if sweep.result(cell)]
    failed = [cell for cell in cells if sweep.failure(cell)]
    todo = sweep.to_run(cells, retry=options.retry)
    counts = f"{len(done):,} done, {len(failed):,} failed, {len(todo):,} to run, {jobs} at a time"
    sys.stderr.write(f"{amount(len(cells), 'cell')}, {counts}{sweep.time_left(cells, len(todo), jobs)}\n{folder}\n")
    if not todo:
        sys.stderr.write("nothing is left to run\n")
    _require_runnable(sweep, todo)
    if options.plan:
        return 0
    command = f"python -m milora_vl.sweep {shlex.join(words)}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "sweep", "wait until it has finished, or use another folder"):
        write_json(folder / "sweep.json", known)

        def write_page() -> tuple[Path, Table]:
            return page.write(page.of_sweep(sweep, cells, options.seeds, command))

        failed = run_sweep(sweep, cells, jobs, retry=options.retry, on_done=write_page)
        written, table = write_page()
    if options.format == "json":
        sys.stdout.write((folder / "results.json").read_text(encoding="utf-8"))
    else:
        show(table, options.format)
    sys.stderr.write(f"page:   {written}\n")
    if failed:
        next_step("milora_vl.sweep", *words, "--retry")
        return 1
    next_step("milora_vl.report", folder / "cells" / cells[0].name)
    return 0


def _checked_cells(options: argparse.Namespace, sweep: Sweep) -> list[Cell]:
    recipe, cells = sweep.recipe, list[Cell]()
    needed = {
        "model: the base model": recipe.model,
        "data.path: the training records": recipe.data.path,
        "data.eval_path: held-out records that select the learning rate": recipe.data.eval_path,
        "sweep.suite, or --suite: the suite or FILE.json that scores the cells": sweep.questions.suite,
    }
    problems = []
    if missing := [what for what, value in needed.items() if not value]:
        copy = f"python -m milora_vl.train --print-recipe {shlex.quote(options.recipe)} > mine.yaml"
        hint = "" if Path(options.recipe).exists() else f"set this in a copy of the recipe:  {copy}"
        message = "\n  ".join(["missing settings that a sweep needs:", *missing])
        problems.append(Problem(message, where=f"recipe {options.recipe}", hint=hint))
    with collected(problems):
        if sweep.questions.suite:
            require_questions(sweep.questions)
    with collected(problems):
        cells = make_cells(recipe, options.methods, options.lrs, options.ranks, options.seeds)
        for cell in cells:
            recipe_of(recipe, cell)
    if problems:
        raise UserError(problems=problems)
    return cells


def _require_runnable(sweep: Sweep, cells: Sequence[Cell]) -> None:
    """Make a dry run of one cell of each arm, and show its warnings. Raises UserError if it cannot run."""
    from milora_vl.train.__main__ import main as train

    for cell in {cell.arm: cell for cell in reversed(cells)}.values():
        with tempfile.TemporaryDirectory() as folder:
            file = write_text(Path(folder) / f"{cell.name}.yaml", recipe_of(sweep.recipe, cell).to_yaml())
            plan = io.StringIO()
            try:
                with redirect_stdout(plan):
                    train(["--recipe", str(file), "--output_dir", f"{folder}/run", "--dry-run"])
            except UserError as error:
                hint = "correct the recipe of the sweep"
                first = Problem("a cell cannot run", "sweep-cell-cannot-run", cell.name, hint)
                raise UserError(problems=[first, *error.problems]) from None
        warnings = [line for line in plan.getvalue().splitlines() if line.startswith("warning: ")]
        sys.stderr.write("".join(f"{cell.label}: {line}\n" for line in warnings))


def _jobs(cells: int) -> int:
    import torch

    return max(1, min(torch.cuda.device_count() or min(usable_cores(), 4), cells))


def _require_same_sweep(sweep: Sweep) -> dict[str, Any]:
    """Return the content of sweep.json. More methods, rates, seeds or variants are allowed.

    Raises UserError if the folder holds cells of another recipe, of other weights, records or questions (under any
    names of their files), or of a variant that has changed.
    """
    known, recipe = read_json(sweep.folder / "sweep.json") or {}, sweep.recipe
    shared = recipe.model_dump(exclude=KNOWN_BY_CONTENT) | {"sweep": {"train": recipe.sweep.train}}
    models = [at_revision(name) for name in (recipe.model, recipe.parts.vision_tower) if name]
    weights = [*models, recipe.adapter, recipe.after, recipe.projector_weights, recipe.parts.vision_weights]
    data = read_records(recipe.data)
    if data.streamed:
        words = "are known by content; the sweep does not notice changes after them"
        sys.stderr.write(f"note: data.streaming: the first {amount(len(data.train), 'record')} {words}\n")
    shares = [source.weight for source in recipe.data.path or () if not isinstance(source, str)]
    images, own = recipe.data.image_folder, recipe.calibration
    parts = (images, data.train), (images, data.evaluation or ()), (own.image_folder, calibration_records(own))
    keys = {
        "recipe": digest([shared, shares]),
        "weights": digest(list(map(_content, weights))),
        "records": [
            data_key(sorted(map(partial(record_key, key_of=FileKeys(folder or "")), part))) for folder, part in parts
        ],
        "questions": questions_key(sweep.questions),
    }
    before, now = known.get("variants", {}), recipe.sweep.variants
    changed = [f"another variant {name}" for name, fields in now.items() if before.get(name, fields) != fields]
    changed += [f"other {name}" for name, key in keys.items() if known and known[name] != key]
    if changed:
        message = f"{sweep.folder} holds a sweep of {' and '.join(changed)}; nothing is overwritten"
        raise UserError(message, where="--output_dir", hint="choose another folder:  --output_dir ANOTHER")
    fields = {"model": sweep.recipe.model, "suite": sweep.questions.suite, "variants": before | now}
    return keys | fields


def _content(model: str | None) -> object:
    """Return the keys of the files of a model, an adapter or a part of one; a name is its own key."""
    path = Path(model or "")
    patterns = ("*.safetensors", "*.bin", "*config.json", "tokenizer.*")  # not what a report writes again
    files = [path] if path.is_file() else [file for pattern in patterns if model for file in path.glob(pattern)]
    return sorted(str(file_key(file)) for file in files) or model


if __name__ == "__main__":
    run(main)
