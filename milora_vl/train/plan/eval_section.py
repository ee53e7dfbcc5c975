"""The `eval:` section of a recipe: checks before the training, and the commands that run after it.

`require_runnable` imports the evaluators by name: milora_vl does not import milora_eval.
"""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

from milora_vl.common.cli.eval_command import eval_trained, is_file
from milora_vl.common.errors import Key, UserError
from milora_vl.train.recipe.schema import Recipe


def commands(recipe: Recipe, output_dir: Path) -> list[list[str]]:
    """Return one command per suite, without the interpreter: it evaluates the base model and the trained model."""
    return [
        ["-m", *eval_trained(output_dir, recipe.model, suite, data=data, limit=recipe.eval.limit)]
        for suite, data in suites_of(recipe).items()
    ]


def suites_of(recipe: Recipe) -> dict[str, str | None]:
    """Return the folder of the data of each entry in `eval.suites`."""
    return {suite: data_of(suite, recipe, recipe.eval.data) for suite in recipe.eval.suites}


def data_of(suite: str, recipe: Recipe, data: str | None) -> str | None:
    """Return `data`; without it, the pictures of own questions (FILE.json) are in the folder of the training's."""
    return data or (recipe.data.image_folder if is_file(suite) else None)


def require_runnable(recipe: Recipe) -> None:
    """Raise UserError for errors that would appear only after training: an unknown suite or missing files."""
    if recipe.eval.suite_every is not None and not recipe.eval.suites:
        raise UserError(
            "there is no suite to score",
            code="flag-needs-another",
            where=Key.of("eval.suite_every"),
            hint="name one in the recipe:  eval: {suites: [quick], data: FOLDER, suite_every: N}",
        )
    twice = [stem for stem, times in Counter(Path(suite).stem for suite in recipe.eval.suites).items() if times > 1]
    if twice:
        raise UserError(
            f"two entries would write their results to eval/{twice[0]}",
            code="eval-duplicate-benchmark",
            where=Key.of("eval.suites"),
            hint="rename one of the files",
        )
    require_questions = importlib.import_module("milora_eval.answers.questions").require_questions
    for suite, data in suites_of(recipe).items():
        require_questions(suite, data, at=Key.of("eval.suites"), data_at=Key.of("eval.data"))
