"""Scores during a training (`--eval_suite_every N`): a small suite is asked of the training model.

The log gets `eval_suite_BENCHMARK` and its standard error, in percent or points as in tables.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.common.errors import Key, UserError
from milora_vl.common.evaluator import TrainingQuestions, evaluator
from milora_vl.train.plan import eval_section
from milora_vl.train.recipe.schema import Recipe


def training_questions(recipe: Recipe) -> TrainingQuestions | None:
    """Return the questions to ask during training, None if the recipe asks for none.

    Raises UserError for missing data, and for a metric of the best checkpoint that no suite measures.
    """
    config = recipe.eval
    if config.suite_every is None:
        return None
    questions = evaluator().training_questions(
        eval_section.suites_of(recipe),
        config.suite_limit,
        template=recipe.template,
        image_aspect_ratio=recipe.data.image_aspect_ratio,
    )
    metric = str(recipe.train.get("metric_for_best_model") or "").removeprefix("eval_")
    if metric.startswith("suite_") and metric.removeprefix("suite_") not in questions.names:
        raise UserError(
            f"{metric} is not measured: the suites have {', '.join(questions.names)}",
            code="metric-unknown",
            where=Key.of("train.metric_for_best_model"),
            hint=f"for example  suite_{questions.names[0]}",
        )
    return questions


class SuiteCallback(TrainerCallback):
    """Measure the scores every `every` steps and at the last step. All processes measure; the trainer logs once."""

    def __init__(self, questions: TrainingQuestions, every: int, trainer: Any, processor: Any) -> None:
        self.questions, self.every, self.trainer, self.processor = questions, every, trainer, processor
        self._step, self._scores = -1, dict[str, float]()

    def scores(self) -> dict[str, float]:
        """Return the scores of the current step, measured once."""
        trainer = self.trainer
        if self._step != trainer.state.global_step:
            with trainer.compute_loss_context_manager():
                self._scores = self.questions.measure(trainer.model, self.processor)
            self._step = trainer.state.global_step
        return dict(self._scores)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure if this step is due."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            due = control.should_log
            self.trainer.log(self.scores())
            control.should_log = due  # HF resets should_log at any log line, also before the loss is logged
