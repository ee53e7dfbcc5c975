"""What a run needs besides the model: collator, token counts, packed rows, chat template, policy.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_model_param_count

from milora_data.collate import ImageTextCollator
from milora_data.lengths import encoded_lengths
from milora_data.pack import PackedRecords, fill, pack
from milora_data.processor_collate import ProcessorCollator
from milora_data.record_collator import RecordCollator
from milora_data.records import Record
from milora_data.templates import OWN, render_chat_template
from milora_data.tokens import remember_legacy
from milora_vl.lora.peft_model import MiloraMixin
from milora_vl.models import loading
from milora_vl.models.image_tokens import image_token_id, image_tokens, tiling_of, uses_processor
from milora_vl.recipe.schema import Recipe
from milora_vl.towers import find_towers
from milora_vl.train.model import Built

# The events that the collator counts, as text.
WHAT_HAPPENED = {
    "skipped": "a record was skipped because one of its pictures is missing or broken",
    "replaced": "a missing or broken picture was replaced by a plain one",
    "unlearnable": "a record was skipped because --max_length cuts off all of its answers",
    "cut": "a record was cut to --max_length",
    "broken": "a broken record was skipped (python -m milora_data check)",
}


def collator(
    recipe: Recipe, base: nn.Module, processor: Any, substitutes: Sequence[Record] = ()
) -> ImageTextCollator | ProcessorCollator:
    """Return the collator for this model: the fast one for LLaVA and text, else the one with the model's processor.

    It accepts no pictures for a text-only model.
    """
    if uses_processor(base.config):
        return ProcessorCollator(
            processor,
            image_folder=recipe.data.image_folder,
            max_length=recipe.data.max_length,
            bad_images=recipe.data.bad_images,
            substitutes=substitutes,
        )
    tokenizer, image_processor = loading.split_processor(processor)
    reads_pictures = find_towers(base).vision is not None
    return ImageTextCollator(
        tokenizer,
        image_processor,
        template=recipe.template,
        image_tokens=image_tokens(base.config) if reads_pictures else 0,
        image_token_id=image_token_id(base.config) if reads_pictures else -1,
        image_folder=recipe.data.image_folder,
        max_length=recipe.data.max_length,
        image_aspect_ratio=recipe.data.image_aspect_ratio,
        bad_images=recipe.data.bad_images,
        jpeg_decoding=recipe.data.jpeg_decoding,
        packing="flat" if recipe.attn_implementation == "flash_attention_2" else "rows",
        substitutes=substitutes,
        tiling=tiling_of(base.config),
    )


def warnings_of(collator: RecordCollator[Any]) -> list[str]:
    """Return one warning for each kind of event that the collator counted during training."""
    return [
        f"{count:,} times while training: {WHAT_HAPPENED[event]}" for event, count in collator.counts().items() if count
    ]


def lengths(recipe: Recipe, base: nn.Module, processor: Any, records: Sequence[Record]) -> list[int] | None:
    """Return the number of tokens per record if the recipe packs records or groups them by length, else None."""
    if not (recipe.data.packing or recipe.train.get("train_sampling_strategy") == "group_by_length"):
        return None
    if uses_processor(base.config):
        collate = collator(recipe, base, processor)
        assert isinstance(collate, ProcessorCollator)
        return collate.lengths(records)
    return encoded_lengths(
        records,
        loading.split_processor(processor)[0],
        template=recipe.template,
        image_tokens=image_tokens(base.config) if find_towers(base).vision is not None else 0,
        max_length=recipe.data.max_length,
        tiling=tiling_of(base.config),
        image_folder=recipe.data.image_folder,
        beside=Path(recipe.data.path) if isinstance(recipe.data.path, str) else None,
    )


def packed(recipe: Recipe, records: Sequence[Record], lengths: Sequence[int]) -> tuple[PackedRecords, str]:
    """Pack the records into rows of 2 x max_length tokens, ordered by the data seed. Also return a summary line."""
    capacity = 2 * recipe.data.max_length
    seed = recipe.train.get("data_seed")
    rows = pack(lengths, capacity, recipe.train.get("seed", 42) if seed is None else seed)
    share = fill(rows, lengths, capacity)
    return PackedRecords(records, rows), f"packed into {len(rows):,} rows of {capacity:,} tokens, {share:.1%} full"


def set_chat_template(processor: Any, template: str) -> None:
    """Set the chat template of processor and tokenizer, so that it renders exactly the prompt of training."""
    tokenizer, image_processor = loading.split_processor(processor)
    remember_legacy(tokenizer)
    if template != OWN:
        tokenizer.chat_template = render_chat_template(template, tokenizer, bos=image_processor is None)
    if image_processor is not None:
        processor.chat_template = tokenizer.chat_template


def policy_json(built: Built) -> dict[str, Any]:
    """Return the content of policy.json: targets, measurements of layers, protections and parameter counts."""
    protected = built.model.protections["default"].values() if built.saves == "adapter" else ()
    return {
        "targets": [target.to_dict() for target in built.targets],
        "layers": [asdict(layer) for layer in built.report],
        "protected": [
            {
                "path": p.path,
                "directions": p.num_directions,
                "energy": p.energy,
                "held_out": p.held_out,
                "bytes": p.num_bytes,
            }
            for p in protected
        ],
        "trainable": get_model_param_count(built.model, trainable_only=True),
        "total": get_model_param_count(built.model),
    }


def protection_json(model: Any) -> dict[str, float]:
    """Return the content of protection.json: what the update does on the protected inputs of each layer, by path.

    That is ||A' V|| / ||A'|| for the input factor A' of the adapter: rounding alone. Empty without protected inputs.
    """
    return model.overlaps_with_inputs("default") if isinstance(model, MiloraMixin) else {}


def base_name(base: nn.Module) -> str:
    """Return the name or folder of the base model, as adapters record it."""
    assert isinstance(base, PreTrainedModel)
    return str(base.config.name_or_path)


def device_name(device: torch.device) -> str:
    """Return `cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
