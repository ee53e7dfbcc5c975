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
from milora_data.pictures.files import ImageError
from milora_data.records.record import IMAGE, Record, uses_tools
from milora_vl.base.errors import DataError, Key, UserError, with_context
from milora_vl.models.loading import split_processor
from milora_vl.models.processors import limit_pixels
from milora_vl.plan.base import Base
from milora_vl.plan.fit import require_template
from milora_vl.recipe.hf_flags import value_of
from milora_vl.recipe.schema import Recipe

FIRST = 100  # records that are checked before the model loads
_MOST_FORMS = 1000  # of which a record is rendered: where pictures are in any turn, each record may have its own


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
        _require_answers(read, checked)


def collator_of(recipe: Recipe, processor: Any) -> ProcessorCollator:
    """Return a collator that raises the error of every record, for checks and counts."""
    limit_pixels(processor, recipe.data.min_pixels, recipe.data.max_pixels)
    return ProcessorCollator(processor, image_folder=recipe.data.image_folder, max_length=recipe.data.max_length)


def check_with(
    collate: ProcessorCollator, recipe: Recipe, records: Sequence[Record], held_out: Sequence[Record]
) -> None:
    """Check records as `require_trainable` does, for a model whose own processor prepares the pictures."""
    for part, checked in (("train", records), ("eval", held_out)):
        kinds = _first_of_kinds(checked)
        _require_one_kind(recipe, collate.inputs, kinds, f"per_device_{part}_batch_size")
        if recipe.data.bad_images == "raise":
            _require_written(collate, checked)
            _require_collated(collate, kinds)
        else:
            _require_usable(collate, [*kinds.values(), *checked[:FIRST]])
        # These records read pictures, so some stand for all: one in `step`.
        step = -(-len(checked) // FIRST) or 1
        _require_answers(collate.require_usable, checked[::step])


def usable(collate: ProcessorCollator, records: Sequence[Record]) -> list[Record]:
    """Return the records that a batch can use; all of them if there is none."""
    kept = []
    for record in records:
        with suppress(DataError):
            collate.require_usable(record)
            kept.append(record)
    return kept or list(records)


def _require_answers(read: Callable[[Record], object], records: Sequence[Record]) -> None:
    """Raise DataError if no record has a supervised token, for example because `max_length` cuts off all answers."""
    unanswered = None
    for record in records:
        try:
            read(record)
        except NoSupervisedTokens as error:
            unanswered = unanswered or error
        except DataError:  # the collator reports it, or leaves the record out, as `bad_images` says
            return
        else:
            return
    if unanswered is not None:
        raise with_context(unanswered, hint=f"the same holds for all {len(records):,} records that were checked")


class _Kind(NamedTuple):
    """What decides how a record is written and batched: a template or a processor may take one kind and not another.

    `frames` has the numbers of frames of its videos, each once and in order.
    """

    has_pictures: bool
    frames: tuple[int, ...]
    has_tools: bool


def _first_of_kinds(records: Sequence[Record]) -> dict[_Kind, Record]:
    """Return the first record of each kind. There may be millions of records: they are read once."""
    kinds: dict[_Kind, Record] = {}
    for record in records:
        frames = tuple(sorted({len(video.frames) for video in record.videos}))
        kinds.setdefault(_Kind(bool(record.images), frames, uses_tools(record)), record)
    return kinds


def _form(record: Record) -> object:
    """Return what chat templates decide by: roles, pictures, videos and tools. There may be millions of records."""
    turns = [(turn.role, IMAGE in turn.text, bool(turn.call)) for turn in record.turns]
    return tuple(turns), len(record.videos), "tools" in record.extra


def _require_written(collate: ProcessorCollator, records: Sequence[Record]) -> None:
    """Raise DataError for a record that the chat template rejects.

    The first records are rendered, the first of each form, and those whose marks or texts may be wrong.
    """
    seen: set[object] = set()
    for number, record in enumerate(records):
        form = _form(record)
        refusable = collate.inputs.may_refuse(record.turns, len(record.images), len(record.videos))
        is_new = form not in seen and len(seen) < _MOST_FORMS
        if number < FIRST or is_new or refusable:
            seen.add(form)
            with suppress(NoSupervisedTokens):  # the collator skips it
                collate.num_supervised(record)


def _require_collated(collate: ProcessorCollator, kinds: Mapping[_Kind, Record]) -> None:
    """Raise DataError if the processor rejects the first record of a kind."""
    # A record with videos of one length is a kind here, whatever that length is: all of its pictures are read.
    grouped: dict[tuple[object, ...], Record] = {}
    for kind, record in kinds.items():
        grouped.setdefault((kind.has_pictures, min(len(kind.frames), 2), kind.has_tools), record)
    for record in grouped.values():
        with suppress(NoSupervisedTokens):
            collate.require_usable(record)


def _require_usable(collate: ProcessorCollator, records: Sequence[Record]) -> None:
    """Raise DataError if the template or the processor rejects each of `records`: a run would leave out all of them."""
    refused = None
    for record in records:
        try:
            collate.require_usable(record)
        except (ImageError, NoSupervisedTokens):  # faults of this record alone
            return
        except DataError as error:
            refused = refused or error
        else:
            return
    if refused is not None:
        hint = f"the first {len({_place(record) for record in records}):,} records are all refused"
        raise with_context(refused, hint=hint)


def _place(record: Record) -> str:
    return record.source or f"record {record.id!r}"


def _require_one_kind(recipe: Recipe, inputs: ProcessorInputs, kinds: Mapping[_Kind, Record], batch_size: str) -> None:
    """Raise UserError if batches would mix kinds of records in a way that the processor or the model cannot.

    `batch_size` is the key of the recipe's `train` section with the size of these batches.
    """
    name = type(inputs.processor).__name__
    pictured = _first(kinds, lambda kind: kind.has_pictures)
    without = _first(kinds, lambda kind: not kind.has_pictures)
    videos: dict[int, Record] = {}
    for kind, record in kinds.items():
        videos |= {count: record for count in kind.frames if count not in videos}
    apart = [
        _first(kinds, lambda kind: kind.has_pictures and not kind.frames),
        _first(kinds, lambda kind: bool(kind.frames) and not kind.has_pictures),
    ]
    if value_of(recipe.train, batch_size) > 1:
        if None not in apart and not inputs.takes_pictures_and_videos:
            raise _mixed(f"{name} cannot put records with pictures and with videos into one batch", apart, batch_size)
        if pictured and without and not inputs.takes_mixed_rows:
            found = f"{name} cannot put records with and without pictures into one batch"
            raise _mixed(found, (pictured, without), batch_size)
        if len(videos) > 1 and not inputs.takes_mixed_videos:
            least, most = min(videos), max(videos)
            found = f"{name} cannot put videos of {least} and {most} frames into one batch"
            raise _mixed(found, (videos[least], videos[most]), batch_size)
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


def _first(kinds: Mapping[_Kind, Record], is_wanted: Callable[[_Kind], bool]) -> Record | None:
    return next((record for kind, record in kinds.items() if is_wanted(kind)), None)


def _mixed(found: str, records: Sequence[Record | None], batch_size: str) -> DataError:
    """Return the error of two records that do not fit into one batch; a record alone has a fault of its own."""
    places = " and ".join(dict.fromkeys(_place(record) for record in records if record is not None))
    accumulation = " and --gradient_accumulation_steps" if "train" in batch_size else ""
    hint = f"use --{batch_size} 1{accumulation}, or records of one kind"
    return DataError(found, code="records-mixed", where=places, hint=hint)
