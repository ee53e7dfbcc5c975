"""`python -m milora_vl.sweep`: methods x learning rates x ranks x seeds over one recipe, compared fairly."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.command import next_step, parser, positive, run
from milora_data.errors import UserError
from milora_data.flags import shared
from milora_data.whole import read_json, write_json
from milora_eval.suites import find_benchmark, find_suite, has_files
from milora_vl.recipe.schema import Recipe

if TYPE_CHECKING:
    from milora_vl.sweep.cells import Cell
    from milora_vl.sweep.runner import Evaluation, Sweep

_EXAMPLES = """\
methods: milora, lora, pissa, random, dora, olora, mica, full (as in milora_vl.train);
         minor-flat (minor directions without their singular values), lora-decay (LoRA with weight decay 0.1);
         and those that the recipe names in sweep.variants
Each cell trains, answers the suite's questions and has its forgetting measured. The learning rate of a method is
chosen by validation loss (data.eval_path of the recipe) and reported on the suite. The same command again goes on.

examples:
  python -m milora_vl.sweep --recipe smol-llava-demo --methods milora,lora --lrs 1e-4,3e-4,1e-3 --seeds 3
  python -m milora_vl.sweep --recipe r.yaml --methods milora,lora --lrs 1e-4,3e-4 --ranks 8,32 --seeds 3 --plan
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; UserError for what cannot be swept. Returns the exit code."""
    options = _options(argv)
    from milora_vl.sweep import page
    from milora_vl.sweep.cells import make_cells, recipe_of
    from milora_vl.sweep.runner import Evaluation, Sweep, alone, run_cells

    recipe = _recipe(options.recipe)
    suite = options.suite or recipe.sweep.suite or next(iter(recipe.eval.suites), None)
    if suite is None:
        raise UserError("what shall the cells be scored on?\nsay:  --suite S, or sweep.suite in the recipe")
    if recipe.data.eval_path is None:
        raise UserError("the learning rate is chosen on held-out records\nsay:  data.eval_path in the recipe")
    evaluation = Evaluation(
        suite, options.data or recipe.sweep.data or recipe.eval.data, options.limit or recipe.sweep.limit
    )
    _check_suite(evaluation)
    folder = options.output_dir or Path("runs") / f"sweep-{Path(options.recipe).stem}"
    sweep = Sweep(folder, recipe, evaluation)
    cells = make_cells(recipe, options.methods, options.lrs, options.ranks, options.seeds)
    for cell in cells:
        recipe_of(recipe, cell)  # every mistake before the first step
    jobs = options.jobs or _jobs(len(cells))
    _same_sweep(sweep)
    _show_plan(sweep, cells, jobs, retry=options.retry)
    if options.plan:
        return 0
    words = shlex.join(sys.argv[1:] if argv is None else argv)
    command = f"python -m milora_vl.sweep {words}"
    with alone(folder):
        _remember(sweep)

        def on_done(cell: Cell, is_done: bool, left: int) -> None:
            said = "done" if is_done else "FAILED" if sweep.failure(cell) else "stopped"
            sys.stderr.write(f"{said:<8}{cell.name}   {left:,} left{_time_left(sweep, cells, left, jobs)}\n")
            page.write(page.of_sweep(sweep, cells, options.seeds, command))

        run_cells(sweep, cells, jobs, retry=options.retry, on_done=on_done)
        written, table = page.write(page.of_sweep(sweep, cells, options.seeds, command))
    failed = [cell for cell in cells if sweep.failure(cell)]
    if options.format == "json":
        sys.stdout.write((folder / "results.json").read_text(encoding="utf-8"))
    else:
        sys.stdout.write(
            "\n".join("  ".join(f"{cell:<22}" for cell in row) for row in (table.header, *table.rows)) + "\n"
        )
    for cell in failed:
        sys.stderr.write(f"failed: {cell.name}   see {folder / 'logs' / cell.name}.log; again with --retry\n")
    sys.stderr.write(f"page:   {written}\n")
    if failed:
        next_step("milora_vl.sweep", *(sys.argv[1:] if argv is None else argv), "--retry")
    else:
        next_step("milora_vl.report", folder / "cells" / cells[0].name)
    return 1 if failed else 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser("python -m milora_vl.sweep", "Compare methods, each at its own best learning rate.", _EXAMPLES)
    given = options.add_argument_group("input")
    given.add_argument("--recipe", required=True, metavar="RECIPE", help="name or file, as for milora_vl.train")
    shared(given, "suite", about="what is scored (default: sweep.suite of the recipe)")
    given.add_argument("--data", metavar="FOLDER", help="with the suite's files")
    settings = options.add_argument_group("settings")
    settings.add_argument("--methods", type=_words, required=True, metavar="a,b", help="the first one is compared with")
    settings.add_argument("--lrs", type=_numbers(float), required=True, metavar="x,y", help="learning rates")
    settings.add_argument("--ranks", type=_numbers(int), metavar="r,s", help="(default: the recipe's own)")
    settings.add_argument("--seeds", type=positive, default=3, help="how many, from the recipe's on (default: 3)")
    shared(settings, "limit", about="items of each benchmark")
    settings.add_argument(
        "--jobs", type=positive, help="cells at a time (default: a GPU each, or a core each, up to 4)"
    )
    settings.add_argument("--plan", action="store_true", help="show the plan and its cost, and stop")
    settings.add_argument("--retry", action="store_true", help="try the cells that failed again")
    out = options.add_argument_group("output")
    shared(out, "output_dir", about="to write (default: runs/sweep-RECIPE)")
    shared(out, "format")
    parsed: argparse.Namespace = options.parse_args(argv)
    return parsed


def _words(text: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise argparse.ArgumentTypeError("names nothing")
    return found


def _numbers(kind: type[float] | type[int]) -> type:
    def parse(text: str) -> list[float]:
        try:
            found = [kind(word) for word in _words(text)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers with commas, got {text!r}") from None
        if min(found) <= 0:
            raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
        return sorted(set(found))

    return parse  # type: ignore[return-value]


def _recipe(name: str):  # type: ignore[no-untyped-def]
    from milora_vl.recipe.settings import read_recipe

    content, lines, source = read_recipe(name)
    return Recipe.parse(content, source, lines)


def _check_suite(evaluation: Evaluation) -> None:
    """UserError for a suite that is not known, or whose files are not there: the cells would fail after training."""

    data = Path(evaluation.data or f"data/{evaluation.suite}")
    names = find_suite(evaluation.suite).benchmarks
    if not any(has_files(find_benchmark(name), data) for name in names):
        raise UserError(
            f"the files of suite {evaluation.suite} are not in {data}\nsee: python -m milora_eval ls --data {data}"
        )


def _jobs(cells: int) -> int:
    import torch

    return max(1, min(torch.cuda.device_count() or min(os.cpu_count() or 1, 4), cells))


def _same_sweep(sweep: Sweep) -> None:
    """UserError where the folder holds cells of another recipe; more methods, rates or seeds may join."""
    known = read_json(sweep.folder / "sweep.json")
    if known is None:
        return
    if known["key"] != _key(sweep):
        raise UserError(
            f"{sweep.folder} holds a sweep over another recipe or suite; nothing is overwritten\n"
            "say:  --output_dir ANOTHER"
        )
    before = known.get("variants", {})
    changed = [name for name, fields in sweep.recipe.sweep.variants.items() if before.get(name, fields) != fields]
    if changed:
        raise UserError(
            f"{sweep.folder} is of a sweep in which {changed[0]} was {before[changed[0]]}\n"
            "say:  --output_dir ANOTHER, or give the new one another name"
        )


def _remember(sweep: Sweep) -> None:
    known = read_json(sweep.folder / "sweep.json") or {}
    content = {"key": _key(sweep), "model": sweep.recipe.model, "suite": sweep.evaluation.suite}
    content["variants"] = known.get("variants", {}) | sweep.recipe.sweep.variants
    write_json(sweep.folder / "sweep.json", content)


def _key(sweep: Sweep) -> str:
    shared = sweep.recipe.model_dump()
    shared["sweep"] = {"train": sweep.recipe.sweep.train}
    return hashlib.sha256(json.dumps([shared, repr(sweep.evaluation)], sort_keys=True).encode()).hexdigest()[:16]


def _show_plan(sweep: Sweep, cells: Sequence[Cell], jobs: int, *, retry: bool) -> None:
    done = [cell for cell in cells if sweep.result(cell)]
    failed = [cell for cell in cells if sweep.failure(cell)]
    left = len(cells) - len(done) - (0 if retry else len(failed))
    counts = f"{len(cells):,} cells, {len(done):,} done, {len(failed):,} failed, {left:,} to run, {jobs} at a time"
    sys.stderr.write(f"{counts}\n{sweep.folder}\n")
    if not left:
        sys.stderr.write("nothing is left to run\n")
        return
    sys.stderr.write(f"cost{_time_left(sweep, cells, left, jobs) or _estimate(sweep, cells[0], left, jobs)}\n")


def _time_left(sweep: Sweep, cells: Sequence[Cell], left: int, jobs: int) -> str:
    """From the time that finished cells took, training and evaluation."""
    seconds = [result["seconds"] for cell in cells if (result := sweep.result(cell))]
    if not seconds or not left:
        return ""
    each = statistics.median(seconds)
    return f", about {each / 60:.1f} minutes each, {each * -(-left // jobs) / 60:.0f} in all"


def _estimate(sweep: Sweep, cell: Cell, left: int, jobs: int) -> str:
    """What `milora_vl.train --dry-run` says of one cell: it also finds missing data. UserError for its mistakes."""
    from milora_vl.sweep.cells import recipe_of

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{cell.name}.yaml")
        file.write_text(recipe_of(sweep.recipe, cell).to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "milora_vl.train", "--recipe", str(file), "--dry-run"]
        command += ["--output_dir", str(Path(folder, cell.name))]  # its own may hold a run to go on with
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"a cell cannot run:\n{done.stderr.removeprefix('error: ').replace(f'{folder}/', '').strip()}")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("memory", "time", "factors"))]
    words = f" of training one of {left:,} cells, {jobs} at a time (measured once the first is done):\n  "
    return words + "\n  ".join(lines)


if __name__ == "__main__":
    run(main)
