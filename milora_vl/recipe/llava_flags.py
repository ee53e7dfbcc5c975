"""The flags of LLaVA's own training scripts (haotian-liu/LLaVA, llava/train/train.py) and what they mean here.

A script like scripts/v1_5/finetune_lora.sh runs with only its program name changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from milora_data.errors import UserError

# name -> (type, help). Flags that are only other names for ours (--lora_r, --version, ...) are in arguments.py.
FLAGS: dict[str, tuple[str, str]] = {
    "lora_enable": ("bool", "MiLoRA on the language tower (plain LoRA with --method lora), the projector in full"),
    "lora_weight_path": ("str", "refused: merge that adapter into the base first"),
    "lora_bias": ("str", "only none: biases stay frozen"),
    "tune_mm_mlp_adapter": ("bool", "train the projector alone (stage 1, pretrain.sh)"),
    "freeze_mm_mlp_adapter": ("bool", "keep the projector frozen"),
    "freeze_backbone": ("bool", "keep the language model frozen"),
    "bits": ("int", "16, or 8 or 4 for a quantised base"),
    "vision_tower": ("str", "the tower that a text-only model gets: a folder, a hub id or timm/NAME"),
    "mm_projector_type": ("str", "only mlp2x_gelu, as LLaVA-1.5"),
    "mm_vision_select_layer": ("int", "the layer of the tower whose features are taken [-2]"),
    "mm_vision_select_feature": ("str", "patch, or cls_patch to keep the class token"),
    "mm_patch_merge_type": ("str", "only flat, as LLaVA-1.5"),
    "mm_use_im_start_end": ("bool", "only False, as LLaVA-1.5"),
    "mm_use_im_patch_token": ("bool", "only False, as LLaVA-1.5"),
    "is_multimodal": ("bool", "no effect: text and pictures may always be mixed"),
    "lazy_preprocess": ("bool", "no effect: records are always encoded when they are needed"),
    "group_by_modality_length": ("bool", "batches of one kind and similar length"),
    "mpt_attn_impl": ("str", "no effect: MPT models are not supported"),
    "cache_dir": ("str", "no effect here; set HF_HOME"),
}
# What LLaVA-1.5's scripts always say and what is so here in any case.
ALREADY_SO: dict[str, tuple[Any, ...]] = {
    "lazy_preprocess": (True, False),
    "is_multimodal": (True, False),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "freeze_mm_mlp_adapter": (False,),
    "freeze_backbone": (False, True),
    "tune_mm_mlp_adapter": (False, True),
    "lora_enable": (False, True),
    "lora_bias": ("none",),
    "bits": (16, 8, 4),
    "mpt_attn_impl": ("triton",),
    "mm_patch_merge_type": ("flat",),
    "mm_projector_type": ("mlp2x_gelu",),
}
REFUSED: dict[str, str] = {
    "lora_weight_path": "continuing from another adapter is not supported yet; merge it into the base first",
    "mm_use_im_start_end": "only False is supported: LLaVA-1.5 has no start and end tokens around pictures",
    "mm_use_im_patch_token": "only False is supported: LLaVA-1.5 has no patch token",
    "lora_bias": "only none is supported",
    "mm_projector_type": "only mlp2x_gelu is supported: Hugging Face's LLaVA has a projector of two layers",
    "mm_patch_merge_type": "only flat is supported, as LLaVA-1.5; take a model of llava-hf/llava-v1.6-* for others",
}
WITHOUT_EFFECT = ("cache_dir", "mpt_attn_impl")
# Not of what trains: beside our own flags they change nothing of the policy.
OF_DATA = ("is_multimodal", "lazy_preprocess", "group_by_modality_length", *WITHOUT_EFFECT)
# LLaVA's flag -> field of the recipe's `parts`.
PARTS = {
    "vision_tower": "vision_tower",
    "mm_vision_select_layer": "select_layer",
    "mm_vision_select_feature": "select_feature",
}


_IN_FULL = "no --lora_enable means all of the language tower in full, embeddings and head included, {}"


@dataclass(frozen=True, slots=True)
class Meaning:
    """A LLaVA command line in our words."""

    rules: list[dict[str, Any]]
    quantization: str | None = None
    line: str = ""
    warnings: list[str] = field(default_factory=list)


def meaning(given: Mapping[str, Any], *, rank: int | None, alpha: float | None, dropout: float | None) -> Meaning:
    """Rules, quantisation and the line that explains them; no rules where the flags do not speak of what trains.

    UserError names a flag that asks for what is not there.
    """
    for name, value in given.items():
        if name in REFUSED and value not in ALREADY_SO.get(name, ()):
            raise UserError(f"--{name} {value}: {REFUSED[name]}")
    if not decide_what_trains(given):
        return Meaning([], warnings=_warnings(given))
    rules, words = _rules(given, rank, alpha, dropout)
    bits = given.get("bits", 16)
    if bits not in (4, 8, 16):
        raise UserError(f"--bits {bits}: expected 16, 8 or 4")
    if bits != 16:
        words += f", on a base quantised to {bits} bits"
    return Meaning(rules, f"{bits}bit" if bits != 16 else None, f"LLaVA flags: {words}", _warnings(given))


def decide_what_trains(given: Mapping[str, Any]) -> bool:
    """Whether any of the flags is more than one about data that stands beside our own."""
    return bool(given.keys() - set(OF_DATA))


def is_script(given: Mapping[str, Any]) -> bool:
    """Whether a command line is one of LLaVA's scripts: then what it leaves out is as LLaVA has it."""
    return any(given.get(name) is not None for name in ("vision_tower", "lora_enable", "tune_mm_mlp_adapter"))


def parts(given: Mapping[str, Any]) -> dict[str, Any]:
    """The tower that a script names, as the recipe's `parts`."""
    return {field: given[flag] for flag, field in PARTS.items() if given.get(flag) is not None}


def _rules(
    given: Mapping[str, Any], rank: int | None, alpha: float | None, dropout: float | None
) -> tuple[list[dict[str, Any]], str]:
    projector: list[dict[str, Any]] = [{"modules": "projector", "method": "full"}]
    alone = [name for name in ("tune_mm_mlp_adapter", "freeze_backbone") if given.get(name)]
    if alone and given.get("freeze_mm_mlp_adapter") and not given.get("lora_enable"):
        raise UserError(f"--{alone[0]} True --freeze_mm_mlp_adapter True: nothing is left to train")
    if given.get("tune_mm_mlp_adapter"):
        return projector, "--tune_mm_mlp_adapter True means the projector alone"
    if given.get("freeze_mm_mlp_adapter"):
        projector = []
    rest = "and the projector in full" if projector else "and the projector frozen"
    if given.get("lora_enable"):
        # LLaVA's own defaults where the script is silent.
        rank = 64 if rank is None else rank
        rule = {"rank": rank, "alpha": 16 if alpha is None else alpha, "dropout": 0.05 if dropout is None else dropout}
        language = {"modules": "language", "method": "milora", **rule}
        return [language, *projector], f"--lora_enable True means MiLoRA of rank {rank} on the language tower {rest}"
    if given.get("freeze_backbone"):
        return projector, "--freeze_backbone True means the projector alone"
    return [{"modules": "language.*", "method": "full"}, *projector], _IN_FULL.format(rest)


def _warnings(given: Mapping[str, Any]) -> list[str]:
    unused = [f"--{name}" for name in WITHOUT_EFFECT if name in given and given[name] not in ALREADY_SO.get(name, ())]
    return [f"without effect here: {' '.join(unused)}"] if unused else []
