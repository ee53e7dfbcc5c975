"""What asks a model questions and scores its answers, as a training and other commands know it: `evaluator()`.

Its package registers a module with the functions of `Evaluator` as an entry point of the group `milora_vl.evaluator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from milora_vl.common.errors import Key, UserError

GROUP = "milora_vl.evaluator"


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of an evaluation: a suite, or `benchmarks` (names or files, with commas); their folder is `data`.

    `limit` is the number of questions of each benchmark; None: all.
    """

    suite: str = ""
    data: str | None = None
    limit: int | None = None
    benchmarks: str = ""


def is_file(suite: str) -> bool:
    """Return whether a suite is a file of own questions."""
    return Path(suite).suffix in (".json", ".jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRequest:
    """An evaluation of a finished model, and of its base if `with_base`. The results go to `output_dir`.

    `model` is the base of the `adapter`, or a fully trained model beside its `base`. `dtype` and `device` are names;
    without a `template` the model gets its run's.
    """

    model: str | Path
    questions: QuestionSet
    output_dir: str | Path
    adapter: str | Path | None = None
    base: str | Path | None = None
    dtype: str | None = None
    device: str | None = None
    template: str | None = None
    with_base: bool = True

    @classmethod
    def of_run(cls, run: Path, model: str, questions: QuestionSet, *, with_base: bool = True) -> EvaluationRequest:
        """Return the evaluation of a run on `model`, into its folder; a config.json there means a full training."""
        if (run / "config.json").is_file():
            return cls(model=run, base=model, questions=questions, output_dir=run, with_base=with_base)
        return cls(model=model, adapter=run, questions=questions, output_dir=run, with_base=with_base)


class TrainingQuestions(Protocol):
    """Questions that are read, to ask a model during its training. `names` has the benchmarks."""

    names: tuple[str, ...]

    def measure(self, model: Any, processor: Any) -> dict[str, float]:
        """Return `eval_suite_BENCHMARK` and its standard error for each benchmark."""


class Evaluator(Protocol):
    def require_questions(self, questions: QuestionSet, *, at: str | Key, data_at: str | Key) -> None:
        """Raise UserError, at these flags, for what an evaluation would fail with: unknown names, missing files."""

    def training_questions(
        self, suites: Mapping[str, str | None], limit: int, *, template: str, image_aspect_ratio: Any, batch_size: int
    ) -> TrainingQuestions:
        """Read the questions of suites, each with its data folder. Raises UserError for missing data."""
        ...

    def command(self, request: EvaluationRequest) -> list[str]: ...

    def compare(
        self, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
    ) -> Sequence[Mapping[str, Any]]:
        """Compare stored answers of two models on the questions that both answer: the entries of a stored comparison.

        Raises UserError for answers that cannot be scored.
        """
        ...


def evaluator() -> Evaluator:
    found = list(entry_points(group=GROUP))
    if len(found) != 1:
        names = ", ".join(entry.value for entry in found) or "none"
        message = f"expected one entry point of the group {GROUP}, found {names}"
        hint = "install milora-vl again; in a clone:  make setup"
        raise UserError(message, code="evaluator-missing", hint=hint)
    loaded: Evaluator = found[0].load()
    return loaded
