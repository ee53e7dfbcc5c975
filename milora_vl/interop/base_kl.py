"""The key `base_kl` of a recipe: a term of the loss that keeps the answers of the base on the calibration texts.

In every n-th step the first forward also reads a few texts, or captions, with the adapter and, without gradients,
without it:

    loss = cross-entropy of the task + n * weight * mean over the tokens of KL(base || model)

Both are parts of one forward, so that DDP, DeepSpeed and FSDP2 see one forward and one backward for a batch. The price
does not depend on the division of a step into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import TrainerCallback, TrainingArguments

from milora_vl.common.compat.torch import extend_forward
from milora_vl.common.errors import UserError
from milora_vl.core.calibration.bases import Batches, Calibration, kinds_of
from milora_vl.core.evaluation_mode import evaluated


class BaseKL:
    """The texts of the term in every `every`-th step. Sources take turns, and in each those with pictures and without.

    `weight` is the weight of the term in an average step. A step with the term has `factor`, `every` times as large.
    """

    def __init__(self, texts: Calibration, weight: float, every: int) -> None:
        self.sources = kinds_of(texts)
        self.every, self.factor = every, every * weight
        self.last = -1  # step that had the term
        self.terms: list[Tensor] = []  # since the last log line

    @property
    def num_texts(self) -> int:
        return sum(len(batch["input_ids"]) for kinds in self.sources for kind in kinds for batch in kind)

    def next_batch(self, step: int, args: TrainingArguments) -> Mapping[str, Tensor] | None:
        """Return the batch of this process at the first forward of a step with the term, counted from 0; else None.

        The step alone decides, so that all processes agree, and a resumed run continues with the next batch.
        All read pictures at the same time: they gather the weights of a sharded vision tower together.
        """
        # Not the first step: a new adapter leaves the base unchanged. Further forwards of a step accumulate gradients.
        if (step + 1) % self.every or step == self.last:
            return None
        self.last = step
        turn, source = divmod(step // self.every, len(self.sources))
        turn, number = divmod(turn, len(self.sources[source]))
        kind = self.sources[source][number]
        return kind[(turn * args.world_size + args.process_index) % len(kind)]

    def taken(self) -> float | None:
        """Return the mean of the term over the steps of this process that had it since the last call, None if none."""
        mean = float(torch.stack(self.terms).mean()) if self.terms else None
        self.terms.clear()
        return mean


def add_base_kl(model: PeftModel) -> None:
    """Add the argument `base_kl` (`with_positions`) to the forward of a model; the output has the term as `base_kl`."""
    extend_forward(model, _forward)


def with_positions(texts: Mapping[str, Tensor], picture: int | None) -> dict[str, Tensor]:
    """Return a batch for the argument `base_kl`, with the positions whose next token counts: no padding and no picture.

    The head computes `columns` of all rows alone, and `indices` of these flattened count. They are found on the CPU: on
    a GPU, their number would be waited for.
    """
    ids, mask = texts["input_ids"][:, 1:], texts["attention_mask"][:, 1:].bool()
    counted = mask if picture is None else mask & (ids != picture)
    columns = counted.any(0).nonzero().squeeze(1)
    return {**texts, "columns": columns, "indices": counted[:, columns].flatten().nonzero().squeeze(1)}


def _forward(
    model: PeftModel, stock: Callable[..., Any], *args: Any, base_kl: Mapping[str, Any] | None = None, **kwargs: Any
) -> Any:
    output = stock(*args, **kwargs)
    return output if base_kl is None else {**output, "base_kl": _term(model, stock, base_kl)}


def _term(model: PeftModel, forward: Callable[..., Any], base_kl: Mapping[str, Any]) -> Tensor:
    batch = {**base_kl}
    columns, indices = batch.pop("columns"), batch.pop("indices")

    def logits() -> Tensor:
        found: Tensor = forward(**batch, use_cache=False, logits_to_keep=columns)["logits"]
        if found.shape[1] != len(columns):  # VideoLLaMA3, MiniCPM-V and Qwen's omni models compute all
            found = found[:, columns]
        return found.flatten(0, 1)[indices].float().log_softmax(-1)

    with torch.no_grad(), model.disable_adapter(), evaluated(model):  # the base has no dropout and no noise
        before = logits()
    return kl_div(logits(), before, log_target=True, reduction="batchmean")


class BaseKLCallback(TrainerCallback):
    """Add the gradient of the term to a step of HF's Trainer or TRL's trainers, before that of its batches:
    `trainer.add_callback(BaseKLCallback(calibration_texts(model)))`.

    `texts` are the base's, as `calibration_texts` returns them, read by twos; `picture` is the id of the token of
    pictures in them. Raises UserError at the start under DeepSpeed, FSDP and fp16, which own the backward.
    """

    def __init__(self, texts: Batches, picture: int | None = None, *, weight: float = 1.0, every: int = 4) -> None:
        starts = ((batch, at) for batch in texts for at in range(0, len(batch["input_ids"]), 2))
        pairs = [{key: part[at : at + 2] for key, part in batch.items() if key != "labels"} for batch, at in starts]
        self.base_kl, self.picture = BaseKL(pairs, weight, every), picture

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        found = AcceleratorState()
        if found.distributed_type in ("DEEPSPEED", "FSDP") or found.mixed_precision == "fp16":
            hint = "train with  python -m milora_vl.train, or with bf16 and DDP"
            raise UserError("base_kl needs a backward of its own here", where="BaseKLCallback", hint=hint)

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        texts, model = self.base_kl.next_batch(state.global_step, args), kwargs["model"]
        if texts is not None:
            batch = {name: part.to(model.device) for name, part in with_positions(texts, self.picture).items()}
            term = _term(model, model.train(), batch)
            (self.base_kl.factor * term).backward()
            self.base_kl.terms.append(term.detach())

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if (mean := self.base_kl.taken()) is not None:
            kwargs["logs"]["base_kl"] = state.log_history[-1]["base_kl"] = mean
