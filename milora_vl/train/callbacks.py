"""Callbacks of a training: forgetting, scores of a suite, log lines, speed, rates, and the end on SIGTERM.

`--forgetting_every N` adds `forgetting` (nats per token above the entropy of the base model), `forgetting_stderr` and
`forgetting_loss_change` to the log; `--eval_suite_every N` adds `eval_suite_BENCHMARK` and its standard error, in
percent or points as in tables.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from milora_data.batches.record_collator import RecordCollator
from milora_vl.common.cli.console import amount, duration_text
from milora_vl.common.evaluator_protocol import TrainingQuestions, evaluator
from milora_vl.core.adapter.anchored import fixed_names
from milora_vl.core.adapter.folders import EARLIER
from milora_vl.core.adapter.lora import base_model_of
from milora_vl.core.policy.towers import find_towers
from milora_vl.core.weights.distributed import maximum_later
from milora_vl.train.data import suites_of
from milora_vl.train.settings import Recipe


class MeasuringCallback(TrainerCallback):
    """Log `measure()` every `every` steps and at the last step. All processes measure; the trainer logs once."""

    def __init__(self, measure: Callable[[], dict[str, float]], every: int, trainer: Any) -> None:
        self.measure, self.every, self.trainer = measure, every, trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            due = control.should_log
            self.trainer.log(self.measure())
            control.should_log = due  # HF resets should_log at any log line, also before the loss is logged


def training_questions(recipe: Recipe, batch_size: int) -> TrainingQuestions | None:
    config = recipe.eval
    if config.suite_every is None:
        return None
    return evaluator().training_questions(
        suites_of(recipe),
        config.suite_limit,
        template=recipe.template,
        image_aspect_ratio=recipe.data.image_aspect_ratio,
        batch_size=min(batch_size, 16),  # a step held as many
    )


class SuiteCallback(MeasuringCallback):
    """Log the scores of a suite, each step's measured once."""

    def __init__(self, questions: TrainingQuestions, every: int, trainer: Any, processor: Any) -> None:
        super().__init__(self.scores, every, trainer)
        self.questions, self.processor, self._step, self._scores = questions, processor, -1, dict[str, float]()

    def scores(self) -> dict[str, float]:
        trainer = self.trainer
        if self._step != trainer.state.global_step:
            with trainer.accelerator.autocast():
                self._scores = self.questions.measure(trainer.model, self.processor)
            self._step = trainer.state.global_step
        return dict(self._scores)


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
    def __init__(self) -> None:
        self.first, self.start = 0, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        self.first, self.start = state.global_step, time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any) -> None:
        done, seconds = state.global_step - self.first, time.monotonic() - self.start
        line = log_line(objects["logs"], state.global_step, state.max_steps, done=done, seconds=seconds)
        if line and state.is_world_process_zero:
            tqdm.write(line, file=sys.stderr)


class Bars(ProgressCallback):
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **objects: Any
    ) -> None:
        """Leave the entry to `Lines`."""


class Meter:
    """Counts tokens of batches. Each process has one; the trainer sums `counts` over processes."""

    def __init__(self, collator: RecordCollator[Any]) -> None:
        self.collator = collator
        self.counts = [0, 0, 0]
        self.start = time.perf_counter()

    def add(self, counts: Sequence[int]) -> None:
        self.counts = [before + more for before, more in zip(self.counts, counts, strict=True)]

    def take(self, totals: Sequence[float]) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.start, 1e-9)
        self.start = time.perf_counter()
        self.counts = [0, 0, 0]
        tokens, positions, supervised = totals
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "padding": round(1 - tokens / max(positions, 1), 4),
            "supervised_tokens": supervised,
            "skipped_records": float(sum(self.collator.counts()[name] for name in ("skipped", "unlearnable"))),
        }


class LogBeforeSave(TrainerCallback):
    """Log at every checkpoint and at the end.

    A resumed run then averages its losses over the same steps as an uninterrupted run.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True


class IntervalsOfThisRun(TrainerCallback):
    """Log, evaluate and save as often as this command says.

    HF's Trainer takes these intervals from the checkpoint when it resumes, and ignores the flags.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.compute_steps(args, state.max_steps)


class KeepDigits(TrainerCallback):
    """Give the buffers that never change the digits back that DeepSpeed 0.17 rounds off with the model."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers = {name: model.get_buffer(name) for name in fixed_names(model)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **objects: Any
    ) -> None:
        for name, kept in self.buffers.items():
            path, _, key = name.rpartition(".")
            module, here = model.get_submodule(path), model.get_buffer(name)
            if here.dtype != kept.dtype:
                module.register_buffer(key, kept.to(here.device), persistent=key not in EARLIER)
        self.buffers.clear()


class FrozenTowers(TrainerCallback):
    """Keep a frozen vision tower out of the backward pass.

    With checkpointing, transformers makes the outputs of all embeddings require gradients, also of pictures.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        base = base_model_of(model)
        towers = find_towers(base)
        if any(p.requires_grad and towers.tower_of(name) == "vision" for name, p in base.named_parameters()):
            return
        for name, module in base.named_modules():
            if isinstance(module, PreTrainedModel) and towers.tower_of(name) == "vision":
                with suppress(NotImplementedError):
                    module.get_input_embeddings().register_forward_hook(lambda _, __, output: output.detach())


class StopOnSignal(TrainerCallback):
    """Save after the current step and stop when SIGTERM arrives, which schedulers send before they end a job.

    Processes may receive the signal at different steps; all of them stop at the same step, the next one.
    """

    def __init__(self) -> None:
        self.received = self.stopped = False
        self.before: Callable[[], int] | None = None  # whether one had received it one step ago

    def on_signal(self, *_: object) -> None:
        self.received = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        received = self.received
        if args.world_size > 1:  # of one step ago: an answer about this step would wait for its end
            before, self.before = self.before, maximum_later(int(received), args.device)
            received = before is not None and bool(before())
        if received:
            self.stopped = control.should_save = control.should_log = control.should_training_stop = True


@contextmanager
def calls_on_sigterm(callback: Callable[..., object]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, callback)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
