"""Forgetting during training (`--eval_forgetting_every N`): a callback that compares with the base's predictions.

The log gets `forgetting` (nats per token above the entropy of the base model), `forgetting_stderr` and
`forgetting_loss_change`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.core.calibration.activations import evaluated
from milora_vl.forgetting.measure import logits_of, summary, token_sums
from milora_vl.forgetting.text import general_text, text_batches
from milora_vl.models.loading import split_processor

# Tokens of general text. The base model's predictions stay in memory: vocabulary x 2 or 4 bytes per token.
NUM_TOKENS, BLOCK_LENGTH, BATCH_SIZE = 1536, 128, 4


class Probe:
    """General text with the base model's predictions for it. Create it before the model is adapted."""

    def __init__(self, base: nn.Module, processor: Any) -> None:
        texts, tokenizer = general_text(), split_processor(processor)[0]
        self.batches = list(
            text_batches(texts, tokenizer, num_tokens=NUM_TOKENS, block_length=BLOCK_LENGTH, batch_size=BATCH_SIZE)
        )
        with torch.inference_mode(), evaluated(base):
            self.targets = [logits_of(base, batch).cpu() for batch in self.batches]

    def measure(self, model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
        """Return the log entry of the current model. Its forward runs in `context`, like a training step."""
        rows: list[Tensor] = []
        documents: list[str] = []
        with torch.no_grad(), evaluated(model):
            for batch, target in zip(self.batches, self.targets, strict=True):
                with context():
                    logits = logits_of(model, batch)
                rows.append(token_sums(logits, target.to(logits.device), batch))
                documents += batch.documents
        result = summary(torch.cat(rows), documents, "general text")
        return {
            "forgetting": result.kl,
            "forgetting_stderr": result.kl_stderr or 0.0,
            "forgetting_loss_change": result.loss_change,
        }


class ForgettingCallback(TrainerCallback):
    """Log the forgetting every `every` steps and at the last step. All processes measure; the trainer logs once."""

    def __init__(self, probe: Probe, every: int, trainer: Any) -> None:
        self.probe, self.every, self.trainer = probe, every, trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure if this step is due. The random state and the mode of the model do not change."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            trainer, due = self.trainer, control.should_log
            trainer.log(self.probe.measure(trainer.model, trainer.compute_loss_context_manager))
            control.should_log = due  # HF resets should_log at any log line, also before the loss is logged
