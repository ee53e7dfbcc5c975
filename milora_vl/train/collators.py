"""Choose the collator of a run, the lengths of records for grouping, packed rows; warnings of skipped records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_data.batches.lengths import lengths_of
from milora_data.batches.pack import PackedRecords, fill, pack
from milora_data.batches.record_collator import RecordCollator
from milora_data.pictures.files import ImagePolicy
from milora_data.records.record import Record
from milora_vl.models.base import Base
from milora_vl.models.collator_for import collator_for
from milora_vl.train.recipe.hf_flags import value_of
from milora_vl.train.recipe.schema import Recipe

# The events that the collator counts, as text.
WHAT_HAPPENED = {
    "skipped": "a record was skipped because one of its pictures is missing or broken",
    "replaced": "a missing or broken picture was replaced by a plain one",
    "unlearnable": "a record was skipped because it has no answer, or --max_length cuts off all of them",
    "cut": "a record was cut to --max_length",
    "broken": "a record was skipped because it is broken or the model does not take it (python -m milora_data check)",
}


def collator(
    recipe: Recipe,
    base: Base,
    processor: Any,
    substitutes: Sequence[Record] = (),
    *,
    bad_images: ImagePolicy | None = None,
) -> RecordCollator[Any]:
    """Return the collator of the run; `bad_images` replaces the recipe's."""
    return collator_for(
        base,
        processor,
        template=recipe.template,
        image_folder=recipe.data.image_folder,
        max_length=recipe.data.max_length,
        image_aspect_ratio=recipe.data.image_aspect_ratio,
        bad_images=bad_images or recipe.data.bad_images,
        packing="flat" if "flash" in recipe.attention_of("language") else "rows",
        substitutes=substitutes,
    )


def warnings_of(collator: RecordCollator[Any]) -> list[str]:
    """Return one warning for each kind of event that the collator counted during training."""
    return [
        f"{count:,} times while training: {WHAT_HAPPENED[event]}" for event, count in collator.counts().items() if count
    ]


def lengths(recipe: Recipe, base: Base, processor: Any, records: Sequence[Record]) -> list[int] | None:
    """Return the number of tokens per record if the recipe packs records or groups them by length, else None."""
    if not (recipe.data.packing or recipe.train.get("train_sampling_strategy") == "group_by_length"):
        return None
    beside = Path(recipe.data.path) if isinstance(recipe.data.path, str) else None
    return lengths_of(records, collator(recipe, base, processor), beside=beside)


def packed(recipe: Recipe, records: Sequence[Record], lengths: Sequence[int]) -> tuple[PackedRecords, str]:
    """Pack the records into rows of 2 x max_length tokens, ordered by the data seed. Also return a summary line."""
    capacity = 2 * recipe.data.max_length
    seed = recipe.train.get("data_seed")
    rows = pack(lengths, capacity, value_of(recipe.train, "seed") if seed is None else seed)
    share = fill(rows, lengths, capacity)
    return PackedRecords(records, rows), f"packed into {len(rows):,} rows of {capacity:,} tokens, {share:.1%} full"
