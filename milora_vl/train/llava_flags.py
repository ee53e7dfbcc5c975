"""The flags of LLaVA's training scripts (llava/train/train.py: `--lora_enable`, `--mm_tunable_parts`, ...) as a recipe.

A script like scripts/v1_5/finetune_lora.sh runs with only its program name changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from milora_vl.common.errors import UserError
from milora_vl.core.policy.rules import DEFAULT_RULES, without_projector

# name -> (type, help). Flags that are aliases of ours (--lora_r, --version, ...) are in flags.py.
FLAGS: dict[str, tuple[type, str]] = {
    "lora_enable": (
        bool,
        "an adapter on the language tower (milora, or --method), the projector in full",
    ),
    "lora_bias": (str, "only none is supported: biases stay frozen"),
    "tune_mm_mlp_adapter": (bool, "train the projector alone (stage 1, pretrain.sh)"),
    "freeze_mm_mlp_adapter": (bool, "keep the projector frozen"),
    "freeze_backbone": (bool, "keep the language model frozen"),
    "bits": (int, "16, or 8 or 4 to quantise the base"),
    "vision_tower": (str, "vision tower to add to a text-only model: a folder, a hub id or timm/NAME"),
    "mm_projector_type": (str, "only mlp2x_gelu is supported, as in LLaVA-1.5"),
    "mm_vision_select_layer": (int, "layer of the tower that supplies the features [-2]"),
    "mm_vision_select_feature": (str, "patch, or cls_patch to keep the class token"),
    "mm_patch_merge_type": (str, "only flat is supported, as in LLaVA-1.5"),
    "mm_use_im_start_end": (bool, "only False is supported, as in LLaVA-1.5"),
    "mm_use_im_patch_token": (bool, "only False is supported, as in LLaVA-1.5"),
    "is_multimodal": (bool, "no effect: records with and without images can always be mixed"),
    "lazy_preprocess": (bool, "no effect: records are always encoded during training"),
    "group_by_modality_length": (bool, "build batches of one modality and similar length"),
    "mpt_attn_impl": (str, "no effect: MPT models are not supported"),
}
# The one value of LLaVA-1.5's scripts that is accepted, and why no other is.
ONLY: dict[str, tuple[Any, str]] = {
    "mm_use_im_start_end": (False, "LLaVA-1.5 has no start and end tokens around images"),
    "mm_use_im_patch_token": (False, "LLaVA-1.5 has no patch token"),
    "lora_bias": ("none", "biases stay frozen"),
    "mm_projector_type": ("mlp2x_gelu", "Hugging Face's LLaVA has a projector of two layers"),
    "mm_patch_merge_type": ("flat", "as in LLaVA-1.5; for the others use a llava-hf/llava-v1.6-* model"),
}
# LLaVA's flag -> field of the recipe's `parts`.
PARTS = {
    "vision_tower": "vision_tower",
    "mm_vision_select_layer": "select_layer",
    "mm_vision_select_feature": "select_feature",
}


_IN_FULL = "without --lora_enable the whole language tower trains in full, embeddings and head included, {}"


@dataclass(frozen=True, slots=True)
class Meaning:
    rules: list[dict[str, Any]]
    quantization: str | None = None
    line: str = ""


def meaning(flags: Mapping[str, Any], *, rank: int | None, alpha: float | None, dropout: float | None) -> Meaning:
    """Return rules, quantisation and a line that explains them; no rules if the flags do not choose what trains."""
    for name, value in flags.items():
        only, why = ONLY.get(name, (value, ""))
        if value != only:
            raise UserError(f"got {value}; only {only} is supported: {why}", code="flag-unsupported", where=f"--{name}")
    bits = flags.get("bits", 16)
    if bits not in (4, 8, 16):
        raise UserError(f"expected 16, 8 or 4, got {bits}", code="flag-value", where="--bits")
    quantization = f"{bits}bit" if bits != 16 else None
    if not decide_what_trains(flags):
        return Meaning([], quantization)
    rules, explanation = _rules(flags, rank, alpha, dropout)
    if all(rule["method"] == "full" for rule in rules):
        _refuse_adapter_flags(flags, explanation, {"rank": rank, "alpha": alpha, "dropout": dropout})
    if quantization:
        explanation += f", with the base quantised to {bits} bits"
    return Meaning(rules, quantization, f"LLaVA flags: {explanation}")


def decide_what_trains(flags: Mapping[str, Any]) -> bool:
    """Return whether the flags decide what trains: they belong to a LLaVA script, or freeze something.

    The other flags concern the data or the model and leave the policy unchanged.
    """
    return is_script(flags) or any(flags.get(name) for name in ("freeze_backbone", "freeze_mm_mlp_adapter"))


def is_script(flags: Mapping[str, Any]) -> bool:
    """Return whether the flags belong to a LLaVA script; then LLaVA's defaults apply to missing flags."""
    named = any(flags.get(name) is not None for name in ("vision_tower", "lora_enable"))
    return named or bool(flags.get("tune_mm_mlp_adapter"))


def parts(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tower that a script names, as the `parts` section of a recipe."""
    return {field: flags[flag] for flag, field in PARTS.items() if flags.get(flag) is not None}


def _rules(
    flags: Mapping[str, Any], rank: int | None, alpha: float | None, dropout: float | None
) -> tuple[list[dict[str, Any]], str]:
    projector: list[dict[str, Any]] = [{"modules": "projector", "method": "full"}]
    alone = [name for name in ("tune_mm_mlp_adapter", "freeze_backbone") if flags.get(name)]
    if alone and flags.get("freeze_mm_mlp_adapter") and not flags.get("lora_enable"):
        message = f"nothing would train with --{alone[0]} and --freeze_mm_mlp_adapter"
        hint = "remove one of the two flags"
        raise UserError(message, code="policy-nothing-trains", where=f"--{alone[0]}", hint=hint)
    if flags.get("tune_mm_mlp_adapter"):
        return projector, "--tune_mm_mlp_adapter True trains only the projector"
    if flags.get("freeze_mm_mlp_adapter"):
        projector = []
    of_projector = "and the projector in full" if projector else "and the projector frozen"
    if flags.get("lora_enable"):
        # LLaVA's defaults for flags that the script does not set.
        rank = 64 if rank is None else rank
        rule = {"rank": rank, "alpha": 16 if alpha is None else alpha, "dropout": 0.05 if dropout is None else dropout}
        language = {"modules": "language", "method": DEFAULT_RULES[0]["method"], **rule}
        return [language, *projector], (
            f"--lora_enable True trains an adapter of rank {rank} on the language tower {of_projector}"
        )
    if flags.get("freeze_backbone"):
        return projector, "--freeze_backbone True trains only the projector"
    if not is_script(flags):
        without = without_projector(DEFAULT_RULES)
        return without, "--freeze_mm_mlp_adapter True trains the default policy without the projector"
    return [{"modules": "language.*", "method": "full"}, *projector], _IN_FULL.format(of_projector)


def _refuse_adapter_flags(flags: Mapping[str, Any], explanation: str, adapter: Mapping[str, float | None]) -> None:
    unused = " ".join(f"--{name}" for name, value in adapter.items() if value is not None)
    if not unused:
        return
    alone = flags.get("tune_mm_mlp_adapter") or flags.get("freeze_backbone")
    hint = f"remove {unused}" if alone else "add --lora_enable True, or --method milora"
    raise UserError(f"no rule makes an adapter: {explanation}", code="policy-no-adapter-rule", where=unused, hint=hint)
