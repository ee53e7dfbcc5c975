"""Scores during training (`--eval_suite_every N`): a small suite on the training model, into the log.

The log gets `eval_suite_BENCHMARK` and its standard error, in percent or points as in tables.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.plan.evaluation import Scored


class SuiteCallback(TrainerCallback):
    """Measure the scores every `every` steps and at the last step. All processes measure; the trainer logs once."""

    def __init__(self, suites: Scored, every: int, trainer: Any, processor: Any) -> None:
        self.suites, self.every, self.trainer, self.processor = suites, every, trainer, processor
        self._step, self._scores = -1, dict[str, float]()

    def scores(self) -> dict[str, float]:
        """Return the scores of the current step, measured once."""
        trainer = self.trainer
        if self._step != trainer.state.global_step:
            with trainer.compute_loss_context_manager():
                self._scores = self.suites.measure(trainer.model, self.processor)
            self._step = trainer.state.global_step
        return dict(self._scores)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure if this step is due."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            due = control.should_log
            self.trainer.log(self.scores())
            control.should_log = due  # HF resets should_log at any log line, also before the loss is logged
