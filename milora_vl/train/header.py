"""The header panel that a run prints before training, and warnings about its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from milora_vl.plan.batching import Batching
from milora_vl.plan.plan import Plan
from milora_vl.plan.run_data import RunData

if TYPE_CHECKING:
    from transformers import TrainingArguments


def rows(
    plan: Plan, model: str, data: RunData, batching: Batching, args: TrainingArguments, dtype: torch.dtype
) -> list[tuple[str, str]]:
    """Return the rows of the header panel. `dtype` is the data type of the frozen weights."""
    folder = plan.folder
    stated, actual = plan.recipe_batch, (batching.per_device, batching.accumulation)
    note = f"   (recipe: {stated[0]} x {stated[1]})" if stated and stated != actual else ""
    source = f"   recipe {plan.request.recipe}" if plan.request.recipe else ""
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"
    panel = [
        ("model", f"{model}{source}"),
        ("data", data.describe()),
        ("batch", batching.describe() + note),
        ("steps", batching.describe_steps()),
        ("dtype", f"{str(dtype).removeprefix('torch.')} base, {precision}, on {args.device}"),
        ("run", str(folder.path)),
    ]
    if folder.checkpoint is not None:
        panel.append(("resumed", folder.checkpoint.name))
    return panel


def warnings(args: TrainingArguments, batching: Batching) -> list[str]:
    """Return warnings about settings that are probably mistakes: a checkpoint interval longer than the run."""
    if args.save_strategy != "steps" or args.save_steps <= batching.steps:
        return []
    last = f"beyond the last step ({batching.steps:,})"
    return [f"save_steps {args.save_steps:g} is {last}: no checkpoint before the end"]
