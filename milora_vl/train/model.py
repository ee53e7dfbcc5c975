"""Load the base model of a run, apply the policy or load the adapter of a checkpoint; dtypes, attention."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from milora_data.encode import NoSupervisedTokens, encode
from milora_data.errors import DataError, UserError, first_line, with_context
from milora_data.images.files import ImageError
from milora_data.processor_collate import ProcessorCollator
from milora_data.processor_inputs import ProcessorInputs
from milora_data.records import IMAGE, Record, uses_tools
from milora_data.templates import OWN
from milora_vl.adapter import apply_targets
from milora_vl.adapter_folders import ADAPTER_FILES, PROJECTOR_FILES
from milora_vl.adapter_io import load_adapter
from milora_vl.initialize import LayerReport
from milora_vl.load import load_model
from milora_vl.lora.sidecar import FILE_NAME
from milora_vl.models.image_tokens import image_tokens
from milora_vl.models.loading import load_processor, meta_model, split_processor
from milora_vl.models.processors import limit_pixels
from milora_vl.models.projector import load_projector
from milora_vl.models.quantized import quantization_config, unquantized
from milora_vl.plan.screen import frozen_towers, trained_sizes
from milora_vl.policy import Target
from milora_vl.recipe.base_model import config_for, prepares_with_processor
from milora_vl.recipe.on_model import require_template
from milora_vl.recipe.schema import Recipe
from milora_vl.train import shared_prefix
from milora_vl.train.trainer import CheckpointKind

FIRST = 100  # records that are checked before the model loads
_MOST_REASONS = 3
WEIGHTS_FILE: dict[CheckpointKind, str] = {"adapter": ADAPTER_FILES[0], "projector": PROJECTOR_FILES[0]}


@dataclass(frozen=True, slots=True)
class Built:
    """A model that is ready to train: a PeftModel, or the base model if only whole modules train."""

    model: Any
    targets: list[Target]
    checkpoint_kind: CheckpointKind
    sizes: dict[str, int]  # number of trained values by target
    report: Sequence[LayerReport]  # one per decomposed weight
    frozen: list[str]  # towers without trained modules


def require_trainable(recipe: Recipe, records: Sequence[Record], held_out: Sequence[Record] = ()) -> list[str]:
    """Check the training and the held-out records with the processor of the base, before its weights load.

    Return a warning for each kind of records that the run will leave out.

    Raises UserError if the model has no chat template or it rejects records, if records are of kinds that the processor
    cannot put into one batch, and if none of the training or of the held-out records has an answer.
    """
    if prepares_with_processor(recipe.model):
        processor = load_processor(recipe.model)
        limit_pixels(processor, recipe.data.min_pixels, recipe.data.max_pixels)
        data, warnings = recipe.data, []
        collate = ProcessorCollator(processor, image_folder=data.image_folder, max_length=data.max_length)
        for part, checked in (("train", records), ("eval", held_out)):
            kinds = _first_of_kinds(checked)
            _require_one_kind(recipe, collate.inputs, kinds, f"per_device_{part}_batch_size")
            if data.bad_images == "raise":
                _require_written(collate, checked)
                _require_collated(collate, kinds)
            else:
                _require_usable(collate, [*kinds.values(), *checked[:FIRST]])
                warnings += _kinds_left_out(collate, checked)
            # These records read pictures, so some stand for all: one in `step`.
            step = -(-len(checked) // FIRST) or 1
            _require_answers(collate.require_usable, checked[::step])
        return warnings
    tokenizer = split_processor(load_processor(recipe.model))[0]
    if recipe.template == OWN:
        first = [*records[:FIRST], *held_out[:FIRST]]
        require_template(recipe, tokenizer, first if recipe.data.bad_images == "raise" else ())
    read = _encoder(recipe, tokenizer)
    for checked in (records, held_out):
        _require_answers(read, checked)
    return []


def load_base(recipe: Recipe, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
    """Load the base model and its processor, and the projector from the recipe's `projector_weights`."""
    model, processor = load_model(recipe.model, dtype=dtype, device=device, quantization=_quantization(recipe))
    limit_pixels(processor, recipe.data.min_pixels, recipe.data.max_pixels)
    _set_attention(model, recipe.attn_implementation)
    if recipe.projector_weights:
        load_projector(model, Path(recipe.projector_weights))
    return model, processor


def _encoder(recipe: Recipe, tokenizer: Any) -> Callable[[Record], object]:
    """Return a function that encodes a record of a LLaVA or a text-only model, with plain pictures."""
    config = config_for(recipe)
    return partial(
        encode,
        tokenizer=tokenizer,
        template=recipe.template,
        image_token_id=-1,
        image_tokens=image_tokens(config) if "vision_config" in config.to_dict() else 0,
        max_length=recipe.data.max_length,
    )


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
        if number < FIRST or form not in seen or refusable:
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


def _kinds_left_out(collate: ProcessorCollator, records: Sequence[Record]) -> list[str]:
    """Return a warning for each reason for which the chat template rejects all records of some form."""
    counts: Counter[object] = Counter()
    errors: dict[object, DataError] = {}
    for record in records:
        form = _form(record)
        counts[form] += 1
        # The first records of a form tell whether the form is rejected, or a text of one record.
        if counts[form] == 1 or (form in errors and counts[form] <= FIRST):
            try:
                collate.num_supervised(record)
                errors.pop(form, None)
            except NoSupervisedTokens:
                errors.pop(form, None)
            except DataError as error:
                errors.setdefault(form, error)
    totals: Counter[str] = Counter()
    firsts: dict[str, str] = {}
    for form, refused in errors.items():
        totals[refused.first.message] += counts[form]
        firsts.setdefault(refused.first.message, refused.first.where)
    return [
        f"{count:,} of {len(records):,} records will be left out: {message} (first: {firsts[message]})"
        for message, count in totals.most_common(_MOST_REASONS)
    ]


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
    if recipe.train.get(batch_size, 8) > 1:
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
            where=f"train.{sharded.lower()}",
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


def _quantization(recipe: Recipe) -> Any:
    """Return the settings of bitsandbytes. As in LLaVA, 4-bit products use the precision of the training."""
    if recipe.quantization == "none":
        return None
    half = torch.bfloat16 if recipe.train.get("bf16") else torch.float16 if recipe.train.get("fp16") else torch.float32
    return quantization_config(
        recipe.quantization,
        unquantized(meta_model(config_for(recipe))),
        quant_type=recipe.quant_type,
        double_quant=recipe.double_quant,
        compute_dtype=half,
    )


def _set_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = first_line(error)
        raise UserError(
            f"{name} is not available here: {reason}",
            code="attention-unavailable",
            where="attn_implementation",
            hint="use sdpa or eager",
        ) from None
    if name == "eager":
        shared_prefix.use_attention(model)


def checkpoint_kind_of(targets: Sequence[Target]) -> CheckpointKind:
    """Return what the checkpoints of a run with these targets hold."""
    if any(t.rank is not None for t in targets):
        return "adapter"
    return "projector" if all(t.tower == "projector" for t in targets) else "full"


def build(
    recipe: Recipe,
    base: nn.Module,
    targets: list[Target],
    checkpoint: Path | None,
    calibration: Sequence[Mapping[str, Any]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Built:
    """Apply the resolved policy, or load the adapter of `checkpoint` with its initial factors (without an SVD).

    `calibration` holds the batches for protected inputs. `dtype` is the data type of the trained weights.
    """

    checkpoint_kind = checkpoint_kind_of(targets)
    sizes = trained_sizes(targets, base)
    if checkpoint is not None:
        _require_same_kind(checkpoint, checkpoint_kind)
    frozen = frozen_towers(base, targets)
    if checkpoint_kind == "adapter" and checkpoint is not None:
        model = load_adapter(base, checkpoint, is_trainable=True, cache_dir=recipe.factor_cache)
        _require_same_adapter(checkpoint, model, targets, recipe.form)
    else:
        model = apply_targets(
            base,
            targets,
            form=recipe.form,
            calibration=calibration,
            cache_dir=recipe.factor_cache,
            progress=True,
        )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return Built(model, targets, checkpoint_kind, sizes, model.milora_report, frozen)


def _require_same_kind(checkpoint: Path, checkpoint_kind: CheckpointKind) -> None:
    expected = WEIGHTS_FILE.get(checkpoint_kind, "model")
    if not any(file.name.startswith(expected) for file in checkpoint.iterdir()):
        found = ", ".join(sorted(f.name for f in checkpoint.glob("*.safetensors"))) or "no weights"
        raise UserError(
            f"the checkpoint is from a run with another method: expected {expected}*, found {found}",
            code="resume-other-method",
            where=str(checkpoint),
            hint="repeat the --method of the run that wrote it",
        )
    if checkpoint_kind == "adapter" and not (checkpoint / FILE_NAME).is_file():
        raise UserError(
            f"{FILE_NAME} is missing; it records which part of the adapter trains and which is the anchor",
            code="checkpoint-incomplete",
            where=str(checkpoint),
            hint="restore the file, or resume from another checkpoint",
        )


def _require_same_adapter(checkpoint: Path, model: Any, targets: Sequence[Target], form: str) -> None:
    """Raise UserError if the rules describe another adapter than the checkpoint holds."""
    stored, requested = (
        {t.path: f"{t.method} of rank {t.rank}, scale {t.scaling:g}" if t.rank else t.method for t in adapted}
        for adapted in (model.milora_targets, targets)
    )
    differing = [
        f"{path}: {stored.get(path, 'frozen')} -> {requested.get(path, 'frozen')}"
        for path in {**stored, **requested}
        if stored.get(path) != requested.get(path)
    ]
    if model.sidecars["default"].form != form:
        differing.insert(0, f"form: {model.sidecars['default'].form} -> {form}")
    if differing:
        more = f"\n... and {len(differing) - 1:,} more" if len(differing) > 1 else ""
        raise UserError(
            f"the checkpoint was trained with other rules and cannot continue with these\n{differing[0]}{more}",
            code="resume-other-rules",
            where=str(checkpoint),
            hint="to resume, repeat the --method, --rank, --alpha, --form or --policy of the run that wrote it",
        )
