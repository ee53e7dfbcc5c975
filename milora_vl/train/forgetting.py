"""Forgetting while it happens: what the base predicts is kept from the start, and compared with every N steps.

The log then holds `forgetting` (nats per token above the base's entropy), `forgetting_stderr` and
`forgetting_loss_change`, beside the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.forgetting.measure import evaluating, logits_of, summary, token_sums
from milora_vl.forgetting.text import general_text, text_batches
from milora_vl.models.loading import split_processor

# Of general text: the base's predictions on them stay in memory (vocabulary x 2 or 4 bytes each).
NUM_TOKENS, BLOCK_LENGTH, BATCH_SIZE = 1536, 128, 4


class Probe:
    """General text with the untouched base's predictions on it. Make it before anything is adapted."""

    def __init__(self, base: nn.Module, processor: Any) -> None:
        texts, tokenizer = general_text(), split_processor(processor)[0]
        self.batches = list(
            text_batches(texts, tokenizer, num_tokens=NUM_TOKENS, block_length=BLOCK_LENGTH, batch_size=BATCH_SIZE)
        )
        with torch.inference_mode(), evaluating(base):
            self.targets = [logits_of(base, batch).cpu() for batch in self.batches]

    def measure(self, model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> dict[str, float]:
        """Return the log entry of a model as it is now; its forward runs in `context`, as a training step does."""
        rows: list[Tensor] = []
        documents: list[str] = []
        with torch.no_grad(), evaluating(model):
            for batch, target in zip(self.batches, self.targets, strict=True):
                with context():
                    own = logits_of(model, batch)
                rows.append(token_sums(own, target.to(own.device), batch))
                documents += batch.documents
        found = summary(torch.cat(rows), documents, "general text")
        return {
            "forgetting": found.kl,
            "forgetting_stderr": found.kl_stderr or 0.0,
            "forgetting_loss_change": found.loss_change,
        }


class ForgettingCallback(TrainerCallback):
    """Log the forgetting every `every` steps and at the last one. All processes measure; the trainer logs once."""

    def __init__(self, probe: Probe, every: int, trainer: Any) -> None:
        self.probe, self.every, self.trainer = probe, every, trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure where it is due; the random state and the mode of the model stay as they are."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            trainer, due = self.trainer, control.should_log
            trainer.log(self.probe.measure(trainer.model, trainer.compute_loss_context_manager))
            control.should_log = due  # HF takes any log line for that of the loss
