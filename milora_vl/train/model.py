"""The model of a run: loaded, with the policy applied or a checkpoint's adapter put back, ready for the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_data.errors import UserError
from milora_vl.adapter import apply_targets
from milora_vl.adapter_io import load_adapter
from milora_vl.initialize import LayerReport
from milora_vl.load import load_model
from milora_vl.lora.sidecar import FILE_NAME
from milora_vl.models.projector import load_projector
from milora_vl.models.quantized import quantization_config
from milora_vl.plan.screen import trained_sizes
from milora_vl.policy import Target
from milora_vl.recipe.schema import Recipe
from milora_vl.towers import TOWERS, find_towers
from milora_vl.train.trainer import Saves

WEIGHTS_FILE: dict[Saves, str] = {"adapter": "adapter_model.safetensors", "projector": "mm_projector.safetensors"}


@dataclass(frozen=True, slots=True)
class Built:
    """A model that is ready to train: a PeftModel, or the base itself where nothing but whole modules trains."""

    model: Any
    targets: list[Target]
    saves: Saves
    sizes: dict[str, int]  # trained numbers by target
    report: Sequence[LayerReport]  # one for each adapter that was decomposed
    frozen: list[str]  # towers of which nothing trains


def load_base(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
    """The base model and its processor; the projector from `projector_weights` where the recipe says so."""

    model, processor = load_model(recipe.model, dtype=dtype, device=device, quantization=_quantization(recipe))
    _set_attention(model, recipe.attn_implementation)
    if recipe.projector_weights:
        load_projector(model, Path(recipe.projector_weights))
    return model, processor


def _quantization(recipe: Recipe) -> Any:
    """Settings of bitsandbytes; what 4 bits are multiplied in is the precision that the run trains in, as in LLaVA."""
    if recipe.quantization == "none":
        return None

    half = torch.bfloat16 if recipe.train.get("bf16") else torch.float16 if recipe.train.get("fp16") else torch.float32
    return quantization_config(
        recipe.quantization,
        quant_type=recipe.quant_type,
        double_quant=recipe.double_quant,
        compute_dtype=half,
    )


def _set_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise UserError(f"attn_implementation: {name} cannot be had here\n{str(error).splitlines()[0]}") from None


def saves_of(targets: Sequence[Target]) -> Saves:
    """What a checkpoint of such a run holds."""
    if any(t.rank is not None for t in targets):
        return "adapter"
    return "projector" if all(t.tower == "projector" for t in targets) else "full"


def build(
    recipe: Recipe, base: nn.Module, targets: list[Target], checkpoint: Path | None, dtype: torch.dtype = torch.float32
) -> Built:
    """Apply the settled policy, or put back the adapter of `checkpoint`: its initial factors, so no SVD is repeated.

    `dtype` is that of the weights that train.
    """

    saves = saves_of(targets)
    sizes = trained_sizes(targets, base)
    if checkpoint is not None:
        _require_same_kind(checkpoint, saves)
    frozen: list[str] = [tower for tower in TOWERS if _has(base, tower) and tower not in {t.tower for t in targets}]
    if saves == "adapter" and checkpoint is not None:
        model = load_adapter(base, checkpoint, is_trainable=True, cache_dir=recipe.factor_cache)
    else:
        model = apply_targets(base, targets, form=recipe.form, cache_dir=recipe.factor_cache, progress=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return Built(model, targets, saves, sizes, model.milora_report, frozen)


def _require_same_kind(checkpoint: Path, saves: Saves) -> None:
    expected = WEIGHTS_FILE.get(saves, "model")
    if not any(file.name.startswith(expected) for file in checkpoint.iterdir()):
        found = ", ".join(sorted(f.name for f in checkpoint.glob("*.safetensors"))) or "no weights"
        raise UserError(
            f"{checkpoint} is of another kind of run: expected {expected}*, found {found}\nis --method the same?"
        )
    if saves == "adapter" and not (checkpoint / FILE_NAME).is_file():
        raise UserError(
            f"{checkpoint} has no {FILE_NAME}, which tells what of the adapter trains and what is its anchor\n"
            "put the file back, or resume from another checkpoint"
        )


def _has(base: nn.Module, tower: str) -> bool:
    towers = find_towers(base)
    return {"language": towers.language, "projector": towers.projector, "vision": towers.vision}[tower] is not None
