"""The `eval:` section of a recipe: `python -m milora_eval run` in a separate process, after training.

This is the only place where training reaches the evaluators. `during` imports them by name, for scores during training.
"""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from milora_data.command.cli import suggest
from milora_data.errors import UserError
from milora_data.templates import OWN
from milora_vl.recipe.base_model import prepares_with_processor
from milora_vl.recipe.schema import EvalConfig, Recipe


def commands(config: EvalConfig, *, model: str, output_dir: Path) -> list[list[str]]:
    """Return one command per suite, without the interpreter, as a user would type it.

    It evaluates the base model and the trained model.
    """
    is_whole_model = (output_dir / "config.json").is_file()
    what = ["--model", str(output_dir), "--base", model]
    if not is_whole_model:
        what = ["--model", model, "--adapter", str(output_dir)]
    options = [] if config.data is None else ["--data", config.data]
    options += [] if config.limit is None else ["--limit", str(config.limit)]
    return [
        ["-m", "milora_eval", "run", *what, "--suite", suite, *options, "--with_base", "--output_dir", str(output_dir)]
        for suite in config.suites
    ]


class Scored(Protocol):
    """Suites whose questions are read; `measure` asks them."""

    def measure(self, model: Any, processor: Any) -> dict[str, float]:
        """Return `eval_suite_BENCHMARK` and its standard error for each benchmark."""


def during(recipe: Recipe) -> Scored | None:
    """Return the suites to score during training, None if the recipe asks for none.

    Raises UserError for missing data.
    """
    config = recipe.eval
    if config.suite_every is None:
        return None
    scored: Scored = importlib.import_module("milora_eval.during").Suites(
        config.suites,
        config.data,
        config.suite_limit,
        template=OWN if prepares_with_processor(recipe.model) else recipe.template or "vicuna_v1",
        image_aspect_ratio=recipe.data.image_aspect_ratio or "pad",
    )
    return scored


def check(config: EvalConfig) -> None:
    """Raise UserError for errors that would appear only after training: an unknown suite or missing files."""
    if config.suite_every is not None and not config.suites:
        raise UserError(
            "there is no suite to score",
            code="flag-needs-another",
            where="eval.suite_every",
            hint="name one in the recipe:  eval: {suites: [quick], data: FOLDER, suite_every: N}",
        )
    for suite in config.suites:
        data = config.data or f"data/{suite}"
        listed = _listed(data)
        if suite not in listed["suites"]:
            near = suggest(suite, listed["suites"])
            known = ", ".join(listed["suites"])
            raise UserError(
                f"unknown suite {suite!r}; expected one of: {known}",
                code="eval-unknown-suite",
                where="eval.suites",
                hint=f"did you mean {near[0]}?" if near else "",
            )
        files = {entry["name"]: entry for entry in listed["benchmarks"]}
        wanted = listed["suites"][suite]["benchmarks"]
        if not any(files[name]["found"] for name in wanted):
            missing = ", ".join(files[wanted[0]]["files"])
            raise UserError(
                f"the files of suite {suite!r} are not in {data} ({missing}, ...), so the evaluation would fail",
                code="eval-missing-files",
                where="eval.data",
                hint=f"see: python -m milora_eval ls --data {data}",
            )


def run(command: list[str]) -> bool:
    """Run a command with its output on stderr. Return whether it succeeded."""
    return subprocess.run([sys.executable, *command], stdout=sys.stderr).returncode == 0


@functools.cache  # one process per folder; the callers only read the result
def _listed(data: str) -> dict[str, Any]:
    where = ["--data", data] if Path(data).is_dir() else []
    command = [sys.executable, "-m", "milora_eval", "ls", *where, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(
            "cannot list the suites of milora_eval", code="eval-list-failed", hint=done.stderr.strip()[:300]
        )
    listed: dict[str, Any] = json.loads(done.stdout)
    return listed
