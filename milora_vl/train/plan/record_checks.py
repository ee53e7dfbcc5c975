"""Check records with the processor of the base before its weights load: templates, kinds in one batch, answers.

There may be millions of records: each is read once, and few are rendered or processed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from milora_data.batches.processor_collate import ProcessorCollator
from milora_data.batches.processor_inputs import ProcessorInputs
from milora_data.encode.labels import NoSupervisedTokens, encode
from milora_data.encode.templates import OWN
from milora_data.records.record import IMAGE, Record, uses_tools
from milora_vl.common.errors import DataError, Key, UserError, with_context
from milora_vl.models.base import Base
from milora_vl.models.image_tokens import configure_processor
from milora_vl.models.loading import split_processor
from milora_vl.train.plan.fit import require_template
from milora_vl.train.recipe.hf_flags import value_of
from milora_vl.train.recipe.schema import Recipe

FIRST = 100  # records that are checked before the model loads


def require_trainable(recipe: Recipe, base: Base, records: Sequence[Record], held_out: Sequence[Record] = ()) -> None:
    """Check the training and the held-out records with the processor of the base, before its weights load.

    Raises UserError if the model has no chat template or it rejects records, if records are of kinds that the processor
    cannot put into one batch, and if none of the training or of the held-out records has an answer.
    """
    if base.own_pictures:
        check_with(collator_of(recipe, base.processor), recipe, records, held_out)
        return
    tokenizer = split_processor(base.processor)[0]
    if recipe.template == OWN:
        first = [*records[:FIRST], *held_out[:FIRST]]
        require_template(recipe, tokenizer, first if recipe.data.bad_images == "raise" else ())
    read = partial(
        encode,
        tokenizer=tokenizer,
        template=recipe.template,
        image_token_id=-1,
        image_tokens=base.fewest_tokens_of_a_picture,
        max_length=recipe.data.max_length,
    )
    for checked in (records, held_out):
        _require_some(read, checked)


def collator_of(recipe: Recipe, processor: Any) -> ProcessorCollator:
    """Return a collator that raises the error of every record, for checks and counts."""
    configure_processor(processor, recipe.data.processor)
    return ProcessorCollator(processor, image_folder=recipe.data.image_folder, max_length=recipe.data.max_length)


def check_with(
    collate: ProcessorCollator, recipe: Recipe, records: Sequence[Record], held_out: Sequence[Record]
) -> None:
    """Check records as `require_trainable` does, for a model whose own processor prepares the pictures."""
    for part, checked in (("train", records), ("eval", held_out)):
        kinds = _first_of_kinds(collate, checked)
        _require_one_kind(recipe, collate.inputs, kinds, f"per_device_{part}_batch_size")
        if recipe.data.bad_images == "raise":
            _require_written(collate, checked)
            shown = {(kind.has_pictures, bool(kind.frames), kind.has_tools): record for kind, record in kinds.items()}
            for record in shown.values():
                with suppress(NoSupervisedTokens):  # the collator skips it
                    collate.require_usable(record)
        # These records read pictures, so some stand for all: one in `step`.
        step = -(-len(checked) // FIRST) or 1
        _require_some(collate.require_usable, checked[::step])


def usable(collate: ProcessorCollator, records: Sequence[Record]) -> list[Record]:
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


class _Kind(NamedTuple):
    """What decides how a record is written and batched: a template or a processor may take one kind and not another."""

    has_pictures: bool
    frames: tuple[int, ...]  # the numbers of frames of its videos, each once and in order
    has_tools: bool


def _first_of_kinds(collate: ProcessorCollator, records: Sequence[Record]) -> dict[_Kind, Record]:
    """Return the first record of each kind. There may be millions of records: they are read once."""
    kinds: dict[_Kind, Record] = {}
    for record in records:
        frames = tuple(sorted(set(collate.num_frames(record))))
        kinds.setdefault(_Kind(bool(record.images), frames, uses_tools(record)), record)
    return kinds


def _form(record: Record) -> object:
    """Return what chat templates decide by: roles, pictures, videos and tools. There may be millions of records."""
    turns = [(turn.role, IMAGE in turn.text, bool(turn.call)) for turn in record.turns]
    return tuple(turns), len(record.videos), "tools" in record.extra


def _require_written(collate: ProcessorCollator, records: Sequence[Record]) -> None:
    """Raise DataError for a record that the chat template rejects.

    The first record of each form is rendered, and those whose marks or texts may be wrong.
    """
    seen: set[object] = set()
    for record in records:
        form = _form(record)
        if form not in seen or collate.inputs.may_refuse(record.turns, len(record.images), len(record.videos)):
            seen.add(form)
            with suppress(NoSupervisedTokens):  # the collator skips it
                collate.num_supervised(record)


def _require_one_kind(recipe: Recipe, inputs: ProcessorInputs, kinds: Mapping[_Kind, Record], batch_size: str) -> None:
    """Raise UserError if batches would mix kinds of records in a way that the processor or the model cannot.

    `batch_size` is the key of the recipe's `train` section with the size of these batches.
    """
    pictured = [record for kind, record in kinds.items() if kind.has_pictures]
    without = [record for kind, record in kinds.items() if not kind.has_pictures]
    packing = recipe.data.packing and batch_size == "per_device_train_batch_size"
    if (packing or value_of(recipe.train, batch_size) > 1) and len(kinds) > 1:
        fix = f"--{batch_size} 1 without --packing" if packing else f"--{batch_size} 1"
        hint = f"use {fix}, or records of one kind"
        if pictured and without and not inputs.takes_mixed_rows:
            raise DataError(
                f"{type(inputs.processor).__name__} cannot put records with and without pictures into one batch",
                code="records-mixed",
                where=f"{_place(pictured[0])} and {_place(without[0])}",
                hint=hint,
            )
        try:
            inputs.require_one_kind(len(pictured), [count for kind in kinds for count in kind.frames])
        except DataError as error:
            shown = [record for kind, record in kinds.items() if kind.has_pictures or kind.frames]
            places = " and ".join(map(_place, shown[:2]))
            raise DataError(error.first.message, code="records-mixed", where=places, hint=hint) from None
    if len({kind.has_pictures or bool(kind.frames) for kind in kinds}) < 2:
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


def _place(record: Record) -> str:
    return record.source or f"record {record.id!r}"
