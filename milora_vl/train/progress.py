"""Progress on stderr: Hugging Face's bar on a terminal, and one short line for each entry of the log.

trainer_state.json and --report_to get all logged values; the line shows only the most useful ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora_vl.common.cli.command_line import amount
from milora_vl.train.dry_run.estimate import duration_text

# Format of each log key, in the order of the line.
SHOWN = {
    "loss": "loss {:.4f}",
    "base_kl": "KL from the base {:.3g}",
    "eval_loss": "loss on held-out records {:.4f}",
    "forgetting": "forgetting {:.4f}",
    "learning_rate": "rate {:.3g}",
    "grad_norm": "gradient {:.3g}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "skipped_records": "{:,.0f} records skipped",
    "epoch": "epoch {:.3g}",
}
SCORE = "eval_suite_"  # of a suite during training, in percent or points
ALWAYS = ("loss", "eval_loss", "forgetting", "learning_rate", "grad_norm")  # the others are shown if they are not 0


def log_line(logs: Mapping[str, Any], step: int, steps: int, *, done: int | None = None, seconds: float = 0) -> str:
    """Return one entry of the log as a line; empty if the entry has no key of SHOWN.

    This process made `done` steps in `seconds`. `done` defaults to `step`; in a resumed run it is smaller.

    >>> log_line({"loss": 1.25, "learning_rate": 2e-4, "epoch": 0.1}, 5, 20, seconds=10)
    'step 5/20  loss 1.2500  rate 0.0002  epoch 0.1  30 s left'
    """
    done = step if done is None else done
    if "train_runtime" in logs:
        return f"{amount(done, 'step')} in {logs['train_runtime']:,.0f} s, loss {logs['train_loss']:.4f} on average"
    scores = {key: value for key, value in logs.items() if key.startswith(SCORE) and not key.endswith("_stderr")}
    values = [f"{key.removeprefix(SCORE)} {value:.1f}" for key, value in scores.items()]
    values += [form.format(logs[key]) for key, form in SHOWN.items() if key in logs and (logs[key] or key in ALWAYS)]
    if "loss" in logs and seconds and done and step < steps:
        values.append(f"{duration_text(seconds / done * (steps - step))} left")
    return "  ".join([f"step {step:,}/{steps:,}", *values]) if values else ""


class Lines(TrainerCallback):
    """Write `log_line` for each entry, above a bar if there is one."""

    def __init__(self) -> None:
        self.first, self.start = 0, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Count steps and time from here."""
        self.first, self.start = state.global_step, time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        """Write the line."""
        done, seconds = state.global_step - self.first, time.monotonic() - self.start
        line = log_line(objects["logs"], state.global_step, state.max_steps, done=done, seconds=seconds)
        if line and state.is_world_process_zero:
            tqdm.write(line, file=sys.stderr)


class Bars(ProgressCallback):
    """HF's bars, without its dictionaries of log entries."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **objects: Any
    ) -> None:
        """Leave the entry to `Lines`."""
