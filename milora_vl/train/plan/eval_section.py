"""The `eval:` section of a recipe: checks before the training, and the commands that run after it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from milora_vl.common.errors import Key, UserError
from milora_vl.common.evaluator import EvaluationRequest, QuestionSet, evaluator
from milora_vl.report.repeat import is_file, of_earlier
from milora_vl.train.recipe.schema import Recipe


def commands(recipe: Recipe, output_dir: Path) -> list[list[str]]:
    """Return one command per suite, without the interpreter: it evaluates the base model and the trained model.

    The questions of the runs that this one came after follow, for the trained model alone.
    """
    questions = [QuestionSet(suite, data, recipe.eval.limit) for suite, data in suites_of(recipe).items()]
    requests = [EvaluationRequest.of_run(output_dir, recipe.model, each) for each in questions]
    names = {Path(each.suite).stem for each in questions}
    for each in of_earlier(output_dir, requests[0]).values() if requests else ():
        name = Path(each.questions.suite or each.questions.benchmarks).stem  # of the folder of its results
        if name not in names:
            names.add(name)
            requests.append(each)
    return [["-m", *evaluator().command(request)] for request in requests]


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
    for suite, data in suites_of(recipe).items():
        questions = QuestionSet(suite, data)
        evaluator().require_questions(questions, at=Key.of("eval.suites"), data_at=Key.of("eval.data"))
