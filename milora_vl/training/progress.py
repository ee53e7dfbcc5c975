"""The training loop on stderr: Hugging Face's bar on a terminal, and one short line for each entry of the log.

All that is logged stands in trainer_state.json and goes to --report_to; a line holds what a person watches.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
        return f"{step:,} steps in {logs['train_runtime']:,.0f} s, loss {logs['train_loss']:.4f} on average"
    found = [form.format(logs[key]) for key, form in SHOWN.items() if key in logs and (logs[key] or key in ALWAYS)]
    return "  ".join([f"step {step:,}/{steps:,}", *found]) if found else ""


class Lines(TrainerCallback):
    """`log_line` for each entry, and no bar: for log files and `--disable_tqdm`."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        """Write the line."""
        line = log_line(objects["logs"], state.global_step, state.max_steps)
        if line and state.is_world_process_zero:
            sys.stderr.write(line + "\n")


class Bars(ProgressCallback):
    """HF's bars, with `log_line` above them in the place of its dictionaries."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **objects: Any
    ) -> None:
        """Write the line above the bar."""
        line = log_line(logs, state.global_step, state.max_steps)
        if line and self.training_bar is not None:
            self.training_bar.write(line, file=sys.stderr)
