"""Load the base model of a run, apply the policy or load the adapter of a checkpoint; dtypes, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.common.cli.console import amount
from milora_vl.common.errors import Key, UserError, first_line
from milora_vl.core.adapter.apply import apply_targets
from milora_vl.core.adapter.earlier import Earlier, hold
from milora_vl.core.adapter.initialize import LayerReport
from milora_vl.core.adapter.lora import base_model_of
from milora_vl.core.adapter.save_load import load_checkpoint
from milora_vl.core.adapter.sidecar import FILE_NAME
from milora_vl.core.calibration.bases import Calibration
from milora_vl.core.policy import Target
from milora_vl.core.policy.towers import find_towers
from milora_vl.models.base import Base
from milora_vl.models.devices import quantization_config, unquantized
from milora_vl.models.loading import load_weights
from milora_vl.models.projector import load_projector
from milora_vl.train.calibration import cache_folder
from milora_vl.train.recipe import Recipe
from milora_vl.train.screen import frozen_towers, trained_sizes
from milora_vl.train.trainer import CheckpointKind


@dataclass(frozen=True, slots=True)
class Built:
    model: Any
    targets: list[Target]
    checkpoint_kind: CheckpointKind
    sizes: dict[str, int]  # number of trained values by target
    report: Sequence[LayerReport]  # one per decomposed weight
    frozen: list[str]  # towers without trained modules


def load_base(recipe: Recipe, base: Base, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
    quantization = _quantization(recipe, base)
    model: Any = load_weights(recipe.model, dtype, quantization=quantization, device=device)
    model = (model if quantization is not None else model.to(device)).eval()
    _set_attention(model, recipe)
    if recipe.projector_weights:
        load_projector(model, Path(recipe.projector_weights))
    return model, base.processor


def _quantization(recipe: Recipe, base: Base) -> Any:
    """Return the settings of bitsandbytes. As in LLaVA, 4-bit products use the precision of the training."""
    if recipe.quantization == "none":
        return None
    half = torch.bfloat16 if recipe.train.get("bf16") else torch.float16 if recipe.train.get("fp16") else torch.float32
    return quantization_config(
        recipe.quantization,
        unquantized(base.meta),
        quant_type=recipe.quant_type,
        double_quant=recipe.double_quant,
        compute_dtype=half,
    )


def _set_attention(model: Any, recipe: Recipe) -> None:
    name: Any = recipe.attn_implementation
    if not isinstance(name, str):
        config, language = model.config, recipe.attention_of("language")
        text = config.get_text_config()
        name = {key: recipe.attention_of("vision") for key in config.sub_configs if key.startswith("vision")}
        name |= {key: language for key in config.sub_configs if getattr(config, key) is text} | {"": language}
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = first_line(error)
        message, hint = f"{recipe.attn_implementation} is not available here: {reason}", "use sdpa or eager"
        raise UserError(message, where=Key.of("attn_implementation"), hint=hint) from None


def checkpoint_kind_of(targets: Sequence[Target]) -> CheckpointKind:
    if any(t.rank is not None for t in targets):
        return "adapter"
    return "projector" if all(t.tower == "projector" for t in targets) else "full"


def build(
    recipe: Recipe,
    base: nn.Module,
    targets: list[Target],
    checkpoint: Path | None,
    calibration: Calibration | None = None,
    dtype: torch.dtype = torch.float32,
    earlier: Earlier | None = None,
) -> Built:
    """Apply the resolved policy, or load the adapter of `checkpoint`, else of the recipe, with its initial factors.

    `calibration` holds the batches for protected inputs. `dtype` is the data type of the trained weights. `earlier` is
    the update that the base of a new run holds.
    """
    checkpoint_kind = checkpoint_kind_of(targets)
    adapter = checkpoint or (Path(recipe.adapter) if recipe.adapter else None)
    sizes = trained_sizes(targets, base)
    frozen = frozen_towers(base, targets)
    if checkpoint_kind == "adapter" and adapter is not None:
        _require_sidecar(adapter)
        model = load_checkpoint(base, adapter)
        _require_same_targets(adapter, targets, model.milora_targets)
        model.remember("default", replace(model.sidecars["default"], targets=targets))  # the rates of this run
    else:
        if earlier is not None:
            hold(base, earlier)
        model = apply_targets(
            base,
            targets,
            calibration=calibration,
            cache_dir=recipe.factor_cache,
            calibration_cache=cache_folder(recipe),
            progress=True,
        )
        if earlier is not None:
            model.earlier = earlier
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if checkpoint is not None and not is_deepspeed_zero3_enabled():  # there DeepSpeed loads its own shards
        _restore(model, checkpoint, checkpoint_kind)
    return Built(model, targets, checkpoint_kind, sizes, model.milora_report, frozen)


def _require_same_targets(adapter: Path, targets: Sequence[Target], stored: Sequence[Target]) -> None:
    here, there = ({t.path: replace(t, learning_rate=None, weight_decay=None) for t in ts} for ts in (targets, stored))
    differ = sorted(path for path in here | there if here.get(path) != there.get(path))
    if differ:
        raise UserError(
            f"{FILE_NAME} and the rules of the recipe differ in {amount(len(differ), 'module')}, first {differ[0]}",
            code="adapter-other-settings",
            where=str(adapter),
            hint="restore the recipe.yaml that belongs to the adapter",
        )


def compile_blocks(model: nn.Module, options: Mapping[str, str]) -> None:
    """Compile each block of the language tower separately; equal blocks share their code.

    The loss in chunks, the vision tower and checkpointing stay outside. `options` are arguments of torch.compile.
    """
    base = base_model_of(model)
    for path in find_towers(base).stacks.get("language", ()):
        for block in base.get_submodule(path).children():
            block.compile(**options)


def _restore(model: Any, checkpoint: Path, checkpoint_kind: CheckpointKind) -> None:
    """Load the projector, or all weights by `from_pretrained`, which knows the names that transformers has changed."""
    if checkpoint_kind == "projector":
        load_projector(model, checkpoint)
    elif checkpoint_kind == "full":
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=torch.float32).state_dict())


def _require_sidecar(checkpoint: Path) -> None:
    if not (checkpoint / FILE_NAME).is_file():
        message = f"{FILE_NAME} is missing; it records which part of the adapter trains and which is the anchor"
        hint = "restore the file, or resume from another checkpoint"
        raise UserError(message, where=str(checkpoint), hint=hint)
