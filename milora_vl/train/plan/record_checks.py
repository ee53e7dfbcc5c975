"""Check records with the processor of the base before its weights load: templates, kinds in one batch, answers.

There may be millions of records: each is read once, and few are rendered or processed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.labels import NoSupervisedTokens
from milora_data.records.record import IMAGE, Record
from milora_vl.common.errors import DataError, Key, UserError, with_context, with_problems
from milora_vl.models.base import Base
from milora_vl.models.loading import split_processor
from milora_vl.models.processors import configure_processor
from milora_vl.train.collators import collator
from milora_vl.train.plan.fit import require_template
from milora_vl.train.recipe.hf_flags import value_of
from milora_vl.train.recipe.schema import Recipe

FIRST = 100  # records that are checked before the model loads


def require_trainable(recipe: Recipe, base: Base, records: Sequence[Record], held_out: Sequence[Record] = ()) -> None:
    """Check the training and the held-out records with the processor of the base, before its weights load.

    Raises UserError if the model has no chat template or it rejects records, if records are of kinds that do not fit
    into one batch, and if none of the training or of the held-out records has an answer.
    """
    check(collator_of(recipe, base, base.processor), recipe, records, held_out)


def collator_of(recipe: Recipe, base: Base, processor: Any) -> RecordCollator[Any]:
    """Return a collator that raises the error of every record, for checks and counts."""
    configure_processor(processor, recipe.data.processor)
    if not base.own_pictures:  # else the processor has the template
        require_template(recipe, split_processor(processor)[0])
    return collator(recipe, base, processor, bad_images="raise")


def check(collate: RecordCollator[Any], recipe: Recipe, records: Sequence[Record], held_out: Sequence[Record]) -> None:
    """Check records as `require_trainable` does, with a collator of `collator_of`."""
    for part, checked in (("train", records), ("eval", held_out)):
        kinds: dict[Hashable, Record] = {}
        for record in checked:
            kinds.setdefault(collate.kind(record), record)
        first = list(kinds.values())
        _require_one_batch(recipe, collate, first, f"per_device_{part}_batch_size")
        if recipe.data.bad_images == "raise":
            _require_written(collate, checked)
            for record in first:
                with suppress(NoSupervisedTokens):  # the collator skips it
                    collate.require_usable(record)
        # A processor reads the images of these records, so some stand for all: one in `step`.
        step = -(-len(checked) // FIRST) or 1
        _require_some(collate.require_usable, checked[::step])


def usable(collate: RecordCollator[Any], records: Sequence[Record]) -> list[Record]:
    """Return the records that a batch can use; all of them if there is none."""
    kept = []
    for record in records:
        with suppress(DataError):
            collate.require_usable(record)
            kept.append(record)
    return kept or list(records)


def _require_some(read: Callable[[Record], object], records: Sequence[Record]) -> None:
    """Raise the first DataError if no record can be read, for example because `max_length` cuts off all answers."""
    first = None
    for record in records:
        try:
            read(record)
        except DataError as error:
            first = first or error
        else:
            return
    if first is not None:
        raise with_context(first, hint=f"none of the {len(records):,} records that were checked can be used")


def _form(record: Record) -> object:
    """Return what chat templates decide by: roles, pictures and videos. There may be millions of records."""
    return tuple((turn.role, IMAGE in turn.text) for turn in record.turns), len(record.videos)


def _require_written(collate: RecordCollator[Any], records: Sequence[Record]) -> None:
    """Raise DataError for a record that the template rejects.

    The first records are read, the first of each form, and those whose marks or texts may be wrong.
    """
    seen: set[object] = set()
    for number, record in enumerate(records):
        form = _form(record)
        if number < FIRST or form not in seen or collate.may_refuse(record):
            seen.add(form)
            with suppress(NoSupervisedTokens):  # the collator skips it
                collate.num_supervised(record)


def _require_one_batch(recipe: Recipe, collate: RecordCollator[Any], first: Sequence[Record], batch_size: str) -> None:
    """Raise UserError if batches would mix kinds of records, `first` one of each, that do not fit together.

    `batch_size` is the key of the recipe's `train` section with the size of these batches.
    """
    packing = recipe.data.packing and batch_size == "per_device_train_batch_size"
    if (packing or value_of(recipe.train, batch_size) > 1) and len(first) > 1:
        fix = f"--{batch_size} 1 without --packing" if packing else f"--{batch_size} 1"
        try:
            collate.require_one_batch(first)
        except DataError as error:
            hint = f"use {fix}, or records of one kind"
            raise with_problems(error, [replace(error.first, hint=hint)]) from None
    if collate.always_shows_images or len({bool(record.files) for record in first}) < 2:
        return
    sharded = "DeepSpeed" if recipe.train.get("deepspeed") else "FSDP" if recipe.train.get("fsdp") else None
    if sharded and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{sharded} needs the same modules on every process in each step, and a batch without pictures skips the "
            f"vision tower of {recipe.model}",
            code="records-mixed-deepspeed",
            where=Key(("train", sharded.lower())),
            hint=f"train without --{sharded.lower()} (DDP), or only on records with pictures",
        )
