"""The time of one cell before any has run: loading, calibration, training and evaluation on this machine, planned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from milora_eval.answers.questions import plan_of
from milora_eval.commands.run import BATCH_SIZE, FORGETTING_TOKENS
from milora_eval.suites import choose, data_folder
from milora_vl.common.errors import Problem, UserError
from milora_vl.common.evaluator import QuestionSet
from milora_vl.sweep.cells import Cell, recipe_of
from milora_vl.sweep.runner import Sweep
from milora_vl.train.dry_run import Outlook, num_parameters, outlook
from milora_vl.train.memory import A100, A100_FLOPS, BANDWIDTH, CPU, CPU_BANDWIDTH, GIB, duration_text, measured_flops

START = 15.0  # seconds until a command has imported everything and checked its flags, on two cores
READ = 0.5 * GIB  # bytes of weights that are read a second
PROMPT = 200  # tokens of a question, with its picture


def planned(sweep: Sweep, todo: Sequence[Cell], jobs: int) -> str:
    """Return the planned time of a cell of each arm, and of all. Raises UserError if one of them cannot run."""
    lines: dict[str, None] = {}
    total = 0.0
    for arm in dict.fromkeys(cell.arm for cell in todo):
        cells = [cell for cell in todo if cell.arm == arm]
        try:
            # Not in the folder of the cell, which may hold a run to resume.
            run = outlook(recipe_of(sweep.recipe, cells[0]), cells[0].name, sweep.folder / "planned")
        except UserError as error:
            hint = "correct the recipe of the sweep"
            first = Problem("a cell cannot run", "sweep-cell-cannot-run", cells[0].name, hint)
            raise UserError(problems=[first, *error.problems]) from None
        seconds = cell_seconds(run, sweep.questions, jobs)
        total += len(cells) * sum(seconds.values()) / jobs
        lines |= dict.fromkeys(f"warning: {warning}" for warning in run.warnings)
        lines |= dict.fromkeys([f"{cells[0].label}, a cell: {as_text(seconds)}", *run.costs.lines])
    every = f"about {duration_text(total)} in all, {jobs} at a time (planned; measured after the first cell)"
    return "\n  ".join([f"  {every}", *lines])


def cell_seconds(run: Outlook, questions: QuestionSet, jobs: int) -> dict[str, float]:
    """Return the seconds of each part of a cell. The questions are read.

    With a GPU, the rate is that of an A100 for each cell; without, `jobs` cells share this CPU.
    """
    on_gpu = torch.cuda.is_available()
    flops, memory = (A100_FLOPS, BANDWIDTH) if on_gpu else (measured_flops() / jobs, CPU_BANDWIDTH / jobs)
    size = num_parameters(run.plan.base.meta)
    weights = size * (2.0 if on_gpu else 4.0)

    def generation(rows: int, prompt: int, tokens: int) -> float:
        """Each token of a batch reads all weights; the prompts are a forward."""
        batches = math.ceil(rows / BATCH_SIZE)
        return batches * tokens * weights / memory + 2 * size * rows * (prompt + tokens) / flops

    chosen = choose(questions.suite)
    _, items = plan_of(chosen, data_folder(questions.suite, questions.data), questions.limit)
    limits = {benchmark.name: benchmark.max_new_tokens for benchmark in chosen.benchmarks}
    answers = sum(generation(len(asked), PROMPT, limits[name]) for name, asked in items.items())
    return {
        "loading": 2 * (START + weights / READ),  # by the training, and by the evaluation
        "calibration": run.costs.start.get(A100, 0.0) if on_gpu else jobs * run.costs.start.get(CPU, 0.0),
        "training": run.batching.steps * run.costs.step_flops / flops,
        "evaluation": answers + 2 * 2 * size * FORGETTING_TOKENS / flops,  # by the model and by its base
    }


def as_text(seconds: dict[str, float]) -> str:
    """Return the time of a cell as one line.

    >>> as_text({"loading": 31.0, "calibration": 0.0, "training": 12.0})
    'about 43 s: loading 31 s, training 12 s'
    """
    parts = ", ".join(f"{name} {duration_text(value)}" for name, value in seconds.items() if value >= 0.5)
    return f"about {duration_text(sum(seconds.values()))}: {parts}"
