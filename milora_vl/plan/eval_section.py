"""The `eval:` section of a recipe: checks before the training, and the commands that run after it.

`require_runnable` imports the evaluators by name: milora_vl does not import milora_eval.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from milora_vl.base.errors import Key, UserError
from milora_vl.cli.command_line import suggest
from milora_vl.cli.eval_command import eval_trained
from milora_vl.recipe.schema import EvalConfig


def commands(config: EvalConfig, *, model: str, output_dir: Path) -> list[list[str]]:
    """Return one command per suite, without the interpreter: it evaluates the base model and the trained model."""
    return [
        ["-m", *eval_trained(output_dir, model, suite, data=config.data, limit=config.limit)] for suite in config.suites
    ]


def require_runnable(config: EvalConfig) -> None:
    """Raise UserError for errors that would appear only after training: an unknown suite or missing files."""
    if config.suite_every is not None and not config.suites:
        raise UserError(
            "there is no suite to score",
            code="flag-needs-another",
            where=Key.of("eval.suite_every"),
            hint="name one in the recipe:  eval: {suites: [quick], data: FOLDER, suite_every: N}",
        )
    for suite in config.suites:
        data = config.data or f"data/{suite}"
        listed = importlib.import_module("milora_eval.suites").listing(Path(data) if Path(data).is_dir() else None)
        if suite not in listed["suites"]:
            near = suggest(suite, listed["suites"])
            known = ", ".join(listed["suites"])
            raise UserError(
                f"unknown suite {suite!r}; expected one of: {known}",
                code="eval-unknown-suite",
                where=Key.of("eval.suites"),
                hint=f"did you mean {near[0]}?" if near else "",
            )
        files = {entry["name"]: entry for entry in listed["benchmarks"]}
        wanted = listed["suites"][suite]["benchmarks"]
        if not any(files[name]["found"] for name in wanted):
            missing = ", ".join(files[wanted[0]]["files"])
            raise UserError(
                f"the files of suite {suite!r} are not in {data} ({missing}, ...), so the evaluation would fail",
                code="eval-missing-files",
                where=Key.of("eval.data"),
                hint=f"see: python -m milora_eval ls --data {data}",
            )
