"""The model of a run: loaded, with the policy applied or a checkpoint's adapter put back, ready for the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from milora_data.encode import NothingToLearn, encode
from milora_data.errors import UserError
from milora_data.records import Record
from milora_data.templates import OWN, TEMPLATES
from milora_data.tokens import own_template
from milora_vl.config import Recipe
from milora_vl.initialize import LayerReport, WeightError
from milora_vl.lora.errors import AdapterError
from milora_vl.lora.sidecar import FILE_NAME
from milora_vl.policy import Policy, PolicyError, Target
from milora_vl.towers import TOWERS, find_towers
from milora_vl.trainer import Saves
from milora_vl.training.policy_edits import without_projector
from milora_vl.training.screen import trained_sizes

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


def load_base(
    recipe: Recipe, dtype: torch.dtype, device: torch.device, first: Sequence[Record] = ()
) -> tuple[nn.Module, Any]:
    """The base model and its processor; the projector from `projector_weights` where the recipe says so.

    UserError, before weights load, for a template that is not there, or that does not take the first records.
    """
    from milora_vl.models import load_model, load_processor, split_processor
    from milora_vl.projector import load_projector

    if recipe.template == OWN:
        checked = first if recipe.data.bad_images == "raise" else ()
        require_template(recipe, split_processor(load_processor(recipe.model))[0], checked)
    model, processor = load_model(recipe.model, dtype=dtype, device=device, quantization=_quantization(recipe))
    _set_attention(model, recipe.attn_implementation)
    if recipe.projector_weights:
        load_projector(model, Path(recipe.projector_weights))
    return model, processor


def require_template(recipe: Recipe, tokenizer: Any, records: Iterable[Record] = ()) -> None:
    """UserError unless the model's own chat template, where the recipe asks for it, is there and takes the records."""
    if recipe.template != OWN:
        return
    try:
        own_template(tokenizer)
    except UserError:
        known = ", ".join(TEMPLATES)
        raise UserError(
            f"--template {OWN}: {recipe.model} has no chat template\nname another template, one of: {known}"
        ) from None
    for record in records:
        with suppress(NothingToLearn):
            encode(record, tokenizer, template=OWN, image_token_id=-1, image_tokens=0)


def _quantization(recipe: Recipe) -> Any:
    """Settings of bitsandbytes; what 4 bits are multiplied in is the precision that the run trains in, as in LLaVA."""
    if recipe.quantization == "none":
        return None
    from milora_vl.quantized import quantization_config

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


def rules_for(recipe: Recipe, base: nn.Module, *, implicit: bool) -> Recipe:
    """The recipe whose default policy fits this model: no projector rule where there is no projector."""
    if not implicit or find_towers(base).projector is not None:
        return recipe
    return recipe.model_copy(update={"policy": without_projector(recipe.policy or [])})


def model_warnings(recipe: Recipe, base: nn.Module, processor: Any) -> list[str]:
    """What of the recipe fits this model badly: prompts other than its own, and how it sees pictures."""
    from milora_vl.image_tokens import tiling_of
    from milora_vl.models import split_processor

    tokenizer, pictures = split_processor(processor)
    if pictures is None and recipe.template == "vicuna_v1" and tokenizer.chat_template:
        return ["prompts are vicuna_v1's; this model brings a chat template of its own: --template chat_template"]

    tiling = tiling_of(cast("Any", base).config)
    if tiling is None:
        return []
    said = []
    if recipe.data.image_aspect_ratio == "pad":
        said.append(f"this model sees pictures in tiles of {tiling.tile} pixels (image_aspect_ratio anyres, not pad)")
    if tiling.most_tokens < recipe.data.max_length:
        return said
    return [
        *said,
        f"a picture takes up to {tiling.most_tokens:,} tokens: at max_length {recipe.data.max_length:,} large ones are "
        "left out, with all that follows them (--max_length 4096)",
    ]


def targets_of(recipe: Recipe, base: nn.Module) -> list[Target]:
    """The resolved policy on a model. UserError with every fault of the rules."""
    try:
        return Policy.parse(recipe.policy or []).resolve(base, cache_dir=recipe.factor_cache)
    except PolicyError as error:
        raise UserError(f"{error}\nsee: python -m milora_vl.train --model {recipe.model} --dry-run") from None


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
    from milora_vl.adapter import apply_targets
    from milora_vl.adapter_io import load_adapter

    saves = saves_of(targets)
    sizes = trained_sizes(targets, base)
    if checkpoint is not None:
        _require_same_kind(checkpoint, saves)
    frozen: list[str] = [tower for tower in TOWERS if _has(base, tower) and tower not in {t.tower for t in targets}]
    try:
        if saves == "adapter" and checkpoint is not None:
            model = load_adapter(base, checkpoint, is_trainable=True, cache_dir=recipe.factor_cache)
            _require_same_adapter(checkpoint, model, targets, recipe.form)
        else:
            model = apply_targets(base, targets, form=recipe.form, cache_dir=recipe.factor_cache, progress=True)
    except (AdapterError, WeightError) as error:
        raise UserError(str(error)) from None
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


def _require_same_adapter(checkpoint: Path, model: Any, targets: Sequence[Target], form: str) -> None:
    """UserError where the rules describe another adapter than the files: tables and pages would show that one."""
    stored, wanted = (
        {t.path: f"{t.method} of rank {t.rank}, scale {t.scaling:g}" if t.rank else t.method for t in found}
        for found in (model.milora_targets, targets)
    )
    differing = [
        f"{path}: {stored.get(path, 'frozen')} -> {wanted.get(path, 'frozen')}"
        for path in {**stored, **wanted}
        if stored.get(path) != wanted.get(path)
    ]
    if model.sidecars["default"].form != form:
        differing.insert(0, f"form: {model.sidecars['default'].form} -> {form}")
    if differing:
        more = f"\n... and {len(differing) - 1:,} more" if len(differing) > 1 else ""
        raise UserError(
            f"{checkpoint} was trained by other rules, and cannot continue with these\n{differing[0]}{more}\n"
            "to resume:  repeat the --method, --rank, --alpha, --form or --policy of the run that wrote it"
        )


def _has(base: nn.Module, tower: str) -> bool:
    towers = find_towers(base)
    return {"language": towers.language, "projector": towers.projector, "vision": towers.vision}[tower] is not None
