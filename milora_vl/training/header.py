"""What a run says of itself before it trains: the rows of the header panel, and warnings about its arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from milora_vl.training.batching import Batching
from milora_vl.training.run_data import RunData
from milora_vl.training.run_folder import RunFolder
from milora_vl.training.settings import Settings

if TYPE_CHECKING:
    from transformers import TrainingArguments


def rows(
    settings: Settings,
    model: str,
    data: RunData,
    batching: Batching,
    args: TrainingArguments,
    dtype: torch.dtype,
    folder: RunFolder,
) -> list[tuple[str, str]]:
    """Rows of the header panel; `dtype` is the dtype of the frozen weights."""
    said, now = settings.batch_in_recipe, (batching.per_device, batching.accumulation)
    beside = f"   (recipe: {said[0]} x {said[1]})" if said and said != now else ""
    source = f"   recipe {settings.source}" if settings.source else ""
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"
    found = [
        ("model", f"{model}{source}"),
        ("data", data.describe()),
        ("batch", batching.describe() + beside),
        ("steps", batching.describe_steps()),
        ("dtype", f"{str(dtype).removeprefix('torch.')} base, {precision}, on {args.device}"),
        ("run", str(folder.path)),
    ]
    if folder.checkpoint is not None:
        found.append(("resumed", folder.checkpoint.name))
    return found


def warnings(args: TrainingArguments, batching: Batching) -> list[str]:
    """What of a run is probably not meant: checkpoints that never come."""
    if args.save_strategy != "steps" or args.save_steps <= batching.steps:
        return []
    last = f"beyond the last step ({batching.steps:,})"
    return [f"save_steps {args.save_steps:g} is {last}: no checkpoint before the end"]
