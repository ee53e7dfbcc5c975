"""The evaluator of `milora_vl.common.evaluator_protocol`, as the entry point registers it: questions in, scores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from milora_vl.common.errors import Key
from milora_vl.common.evaluator_protocol import EvaluationRequest, QuestionSet, TrainingQuestions


def require_questions(questions: QuestionSet, *, at: str | Key, data_at: str | Key) -> None:
    """Raise UserError, at these flags, for what an evaluation would fail with: unknown names, missing files."""
    from milora_eval.answers.questions import require_questions

    require_questions(questions, at=at, data_at=data_at)


def training_questions(
    suites: Mapping[str, str | None],
    limit: int,
    *,
    template: str,
    image_aspect_ratio: Literal["pad", "plain", "anyres"],
    batch_size: int,
) -> TrainingQuestions:
    """Read the questions of suites, each with its data folder. Raises UserError for missing data."""
    from milora_eval.run_suite import TrainingSuites

    return TrainingSuites(
        suites, limit, template=template, image_aspect_ratio=image_aspect_ratio, batch_size=batch_size
    )


def command(request: EvaluationRequest) -> list[str]:
    """Return the words of `milora_eval run`, as they follow `python -m`.

    >>> " ".join(command(EvaluationRequest(model="tiny", adapter="a", questions=QuestionSet("quick"), output_dir="a")))
    'milora_eval run --model tiny --adapter a --suite quick --with_base --output_dir a'
    """
    questions = request.questions
    values = {
        "model": request.model,
        "adapter": request.adapter,
        "base": request.base,
        "suite": questions.suite or None,
        "benchmarks": questions.benchmarks or None,
        "data": questions.data,
        "dtype": request.dtype,
        "device": request.device,
        "template": request.template,
        "limit": questions.limit,
    }
    words = ["milora_eval", "run"]
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", str(value)]
    words += ["--with_base"] if request.with_base else []
    return [*words, "--output_dir", str(request.output_dir)]


def compare(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare stored answers of two models on the questions that both answer: the entries of a stored comparison.

    Raises UserError for answers that cannot be scored.
    """
    from milora_eval.scores.compare import compare

    return [asdict(each) for each in compare(list(map(dict, before)), list(map(dict, after)))]
