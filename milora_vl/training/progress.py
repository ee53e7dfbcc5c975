"""The training loop on stderr: Hugging Face's bar on a terminal, and one short line for each entry of the log.

All that is logged stands in trainer_state.json and goes to --report_to; a line holds what a person watches.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

# Key of the log -> how it is shown, in this order.
SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "loss on held-out records {:.4f}",
    "forgetting": "forgetting {:.4f}",
    "learning_rate": "rate {:.3g}",
    "grad_norm": "gradient {:.3g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "skipped_records": "{:,.0f} records skipped",
    "epoch": "epoch {:.3g}",
}
ALWAYS = ("loss", "eval_loss", "forgetting", "learning_rate")  # the others where they are not 0


def log_line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """Return one entry of the log as a line; empty where it holds nothing that is shown.

    >>> log_line({"loss": 1.25, "learning_rate": 2e-4, "grad_norm/language": 0.5, "epoch": 0.1}, 5, 20)
    'step 5/20  loss 1.2500  rate 0.0002  epoch 0.1'
    """
    if "train_runtime" in logs:
        return f"{steps:,} steps in {logs['train_runtime']:,.0f} s, loss {logs['train_loss']:.4f} on average"
    found = [form.format(logs[key]) for key, form in SHOWN.items() if key in logs and (logs[key] or key in ALWAYS)]
    return "  ".join([f"step {step:,}/{steps:,}", *found]) if found else ""


class Progress(ProgressCallback):
    """HF's bars, on a terminal alone, and `log_line` in the place of its dictionaries."""

    def __init__(self, *, bars: bool) -> None:
        super().__init__()
        self.bars = bars and sys.stderr.isatty()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Draw the bar."""
        if self.bars:
            super().on_train_begin(args, state, control, **objects)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Move it on."""
        if self.bars:
            super().on_step_end(args, state, control, **objects)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Draw, or move on, the bar of an evaluation."""
        if self.bars:
            super().on_prediction_step(args, state, control, **objects)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write the line above the bar."""
        line = log_line(logs or {}, state.global_step, state.max_steps)
        if not (line and state.is_world_process_zero):
            return
        if self.training_bar is None:
            sys.stderr.write(line + "\n")
        else:
            self.training_bar.write(line, file=sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Take the bar away."""
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **objects)
