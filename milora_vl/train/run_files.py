"""What a run makes besides weights: collator, chat template, policy.json, spectra, differences on resume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import get_model_param_count

from milora_data.anyres import Tiling
from milora_data.collate import ImageTextCollator
from milora_data.errors import UserError
from milora_data.lengths import encoded_lengths
from milora_data.pack import PackedRecords, fill, pack
from milora_data.records import Record
from milora_data.templates import render_chat_template
from milora_data.tokens import remember_legacy
from milora_vl.models import loading
from milora_vl.models.image_tokens import image_token_id, image_tokens, tiling_of
from milora_vl.recipe.schema import Recipe, load
from milora_vl.towers import find_towers
from milora_vl.train.model import Built


def collator(recipe: Recipe, base: nn.Module, processor: Any, substitutes: Sequence[Record] = ()) -> ImageTextCollator:
    """The collator for this model; without pictures for a text-only one."""
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
        tiling=_tiling(recipe, base),
    )


def _tiling(recipe: Recipe, base: nn.Module) -> Tiling | None:
    """How the model tiles pictures, if it does. UserError where the recipe asks for another treatment."""
    assert isinstance(base, PreTrainedModel)
    tiling = tiling_of(base.config)
    asked = recipe.data.image_aspect_ratio
    if (asked == "anyres" and tiling is None) or (asked == "plain" and tiling is not None):
        does = "sees a picture once: pad or plain" if tiling is None else "tiles its pictures: anyres"
        raise UserError(f"data.image_aspect_ratio: {asked}, but {recipe.model} {does}")
    if tiling is not None and recipe.data.jpeg_decoding == "draft":
        raise UserError("data.jpeg_decoding: draft, but tiles are cut from pictures of full size: exact")
    return tiling


def lengths(recipe: Recipe, base: nn.Module, processor: Any, records: Sequence[Record]) -> list[int] | None:
    """How many tokens each record takes, where the recipe asks for packing or for batches of similar length."""
    if not (recipe.data.packing or recipe.train.get("train_sampling_strategy") == "group_by_length"):
        return None
    return encoded_lengths(
        records,
        loading.split_processor(processor)[0],
        template=recipe.template,
        image_tokens=image_tokens(base.config) if find_towers(base).vision is not None else 0,
        max_length=recipe.data.max_length,
        tiling=_tiling(recipe, base),
        image_folder=recipe.data.image_folder,
        beside=Path(recipe.data.path) if isinstance(recipe.data.path, str) else None,
    )


def packed(recipe: Recipe, records: Sequence[Record], lengths: Sequence[int]) -> tuple[PackedRecords, str]:
    """The records in rows of twice max_length, in an order of the data's seed, and a line about how full they are."""
    capacity = 2 * recipe.data.max_length
    seed = recipe.train.get("data_seed")
    rows = pack(lengths, capacity, recipe.train.get("seed", 42) if seed is None else seed)
    share = fill(rows, lengths, capacity)
    return PackedRecords(records, rows), f"packed into {len(rows):,} rows of {capacity:,} tokens, {share:.1%} full"


def set_chat_template(processor: Any, template: str) -> None:
    """Give the processor, and its tokenizer, a chat template that renders exactly the prompt of training."""
    tokenizer, image_processor = loading.split_processor(processor)
    remember_legacy(tokenizer)
    tokenizer.chat_template = render_chat_template(template, tokenizer, bos=image_processor is None)
    if image_processor is not None:
        processor.chat_template = tokenizer.chat_template


def policy_json(built: Built) -> dict[str, Any]:
    """What policy.json holds: the resolved targets, what was measured, what is protected, and how much trains."""
    protected = built.model.protections["default"].values() if built.saves == "adapter" else ()
    return {
        "targets": [asdict(target) for target in built.targets],
        "layers": [asdict(layer) for layer in built.report],
        "protected": [{"path": p.path, "energy": p.energy, "bytes": p.num_bytes} for p in protected],
        "trainable": get_model_param_count(built.model, trainable_only=True),
        "total": get_model_param_count(built.model),
    }


def changes(folder: Path, recipe: Recipe) -> list[str]:
    """What differs between the recipe of a run so far and the one it is resumed with."""
    if not (folder / "recipe.yaml").is_file():
        return []
    before, now = dict(_flat(load(folder / "recipe.yaml").model_dump())), dict(_flat(recipe.model_dump()))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key} {before.get(key)} -> {now.get(key)}" for key in keys]


def base_name(base: nn.Module) -> str:
    """The name or folder the base was loaded by, as adapters record it."""
    assert isinstance(base, PreTrainedModel)
    return str(base.config.name_or_path)


def device_name(device: torch.device) -> str:
    """`cpu`, or a GPU by its name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _flat(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _flat(value, f"{path}[{number}]")
    else:
        yield path, content
