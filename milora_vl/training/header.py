"""What a run says of itself before it trains: the rows of the header panel, and warnings about its arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from milora_vl.config import Recipe
from milora_vl.training.batching import Batching
from milora_vl.training.policy_edits import PolicyEdits
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


def warnings(args: TrainingArguments, batching: Batching, recipe: Recipe, edits: PolicyEdits) -> list[str]:
    """What of a run is probably not meant: checkpoints that never come, a high rate for full training."""
    found = []
    if args.save_strategy == "steps" and args.save_steps > batching.steps:
        found.append(
            f"save_steps {args.save_steps:g} is beyond the last step ({batching.steps:,}): no checkpoint before the end"
        )
    rates = {rule.get("learning_rate") for rule in recipe.policy or () if rule.get("method") == "full"}
    if edits.method == "full" and any(rate and rate > 5e-5 for rate in rates):
        found.append(
            f"full training at a learning rate of {max(filter(None, rates)):g}; LLaVA uses 2e-5 (--learning_rate)"
        )
    return found
