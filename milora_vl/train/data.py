"""The records of a run and of the runs that it comes after: read, checked, collated, packed; the loaders.

Everything in the files that would fail later is an error before the weights load. There may be millions of records:
each is read once, and few are rendered or processed. milora.json of a run lists all tasks in order, the run's own last.
An entry holds what is needed to read its records:

    {"run": "runs/a", "template": "vicuna_v1", "records": 1200, "fingerprint": "4f0c...", "pictures": "77a1...",
     "data": {"path": "a.json", "image_folder": "pictures", "eval_path": "held_out.json"},   # keys that are set
     "eval": {"suites": ["emoji"], "data": "questions"},                                     # the same
     "rules": [{"tower": "language", "method": "milora", "rank": 64, "protect": 0.95, "modules": 224}],
     "directions": {"language": 0.268}}   # share of the input directions that the run protected, mean over the layers
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderAdapter
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from milora_data.batches.lengths import lengths_of
from milora_data.batches.pack import PackedRecords, fill, pack
from milora_data.batches.processor_inputs import ProcessorSettings, configure_processor, usable_inputs
from milora_data.batches.record_collator import RecordCollator
from milora_data.check import RunData, read_training_records, sources_of
from milora_data.encode.labels import NoSupervisedTokens
from milora_data.encode.templates import OWN, TEMPLATES
from milora_data.encode.tokens import own_template
from milora_data.pictures.load import ImagePolicy
from milora_data.records.record import IMAGE, Record
from milora_data.stream import load_records
from milora_data.stream.dataset import RecordStream, record_stream
from milora_vl.common.errors import DataError, Key, UserError, require_folder, with_context, with_problems
from milora_vl.common.evaluator_protocol import QuestionSet, evaluator, is_file
from milora_vl.core.weights.tensor_files import read_weights
from milora_vl.models.base import Base, require_parts, split_processor
from milora_vl.models.collator_for import CountingCollator, collator_for
from milora_vl.train.launch import attention_of
from milora_vl.train.settings import CalibrationConfig, DataConfig, Recipe, value_of

INSPECTED = 100  # records of a stream that are checked before training
FIRST = 100  # records that are rendered before the model loads
MOST_RECORDS = 512  # of calibration.data
TIMEOUT = 1800.0
"""Seconds after which loader processes without a batch count as hung. A slow file system needs seconds, not this."""
# The events that the collator counts, as text.
WHAT_HAPPENED = {
    "skipped": "a record was skipped because one of its pictures is missing or broken",
    "unlearnable": "a record was skipped because it has no answer, or --max_length cuts off all of them",
    "cut": "a record was cut to --max_length",
    "broken": "a record was skipped because it is broken or the model does not take it (python -m milora_data check)",
}


def suites_of(recipe: Recipe) -> dict[str, str | None]:
    return {suite: data_of(suite, recipe, recipe.eval.data) for suite in recipe.eval.suites}


def data_of(suite: str, recipe: Recipe, data: str | None) -> str | None:
    """Return `data`; without it, the pictures of own questions (FILE.json) are in the folder of the training's."""
    return data or (recipe.data.image_folder if is_file(suite) else None)


def require_evaluation(recipe: Recipe) -> None:
    """Raise UserError for errors that would appear only after training: an unknown suite or missing files."""
    suites = recipe.eval.suites
    if recipe.eval.suite_every is not None and not suites:
        hint = "name one in the recipe:  eval: {suites: [quick], data: FOLDER, suite_every: N}"
        where = Key.of("eval.suite_every")
        raise UserError("there is no suite to score", code="flag-needs-another", where=where, hint=hint)
    for suite, files in suites_of(recipe).items():
        questions = QuestionSet(suite, files)
        evaluator().require_questions(questions, at=Key.of("eval.suites"), data_at=Key.of("eval.data"))


def processor_settings(data: DataConfig) -> ProcessorSettings:
    return ProcessorSettings(**{key.name: getattr(data, key.name) for key in fields(ProcessorSettings)})


def require_usable(recipe: Recipe, base: Base) -> None:
    """Raise UserError, before any weights load, if a part is missing or pictures cannot be prepared for the model.

    The processor of the base then follows the recipe.
    """
    settings = processor_settings(recipe.data)
    if base.own_pictures:
        configure_processor(base.processor, settings)
        usable_inputs(base.processor, base.name)
    require_parts(base.parts, recipe.projector_weights)
    if recipe.factor_cache:  # a complete cache may be on a disk that is read-only
        require_folder(Path(recipe.factor_cache), Key.of("factor_cache"), is_written=False)


def read_records(config: DataConfig) -> RunData:
    require_named(config)
    assert config.path is not None
    stream = None
    if config.streaming:
        if find_spec("torchdata") is None:
            hint, where = "pip install -e '.[data]'", Key.of("data.streaming")
            raise UserError("the package torchdata is not installed", code="package-missing", where=where, hint=hint)
        stream = islice(record_stream(sources_of(config.path), shuffle_buffer=0), INSPECTED)
    return read_training_records(
        config.path,
        eval_path=config.eval_path,
        image_folder=config.image_folder,
        bad_images=config.bad_images,
        limit=config.limit,
        stream=stream,
    )


def calibration_records(config: CalibrationConfig) -> list[Record]:
    return list(islice(load_records(config.data), MOST_RECORDS)) if config.data else []


def require_named(config: DataConfig) -> None:
    if config.path is None:
        raise UserError("no training data", code="data-no-path", hint="set --data_path, or data.path in the recipe")


def collator(
    recipe: Recipe,
    base: Base,
    processor: Any,
    substitutes: Sequence[Record] = (),
    *,
    bad_images: ImagePolicy | None = None,
) -> RecordCollator[Any]:
    collate = collator_for(
        base,
        processor,
        template=recipe.template,
        image_folder=recipe.data.image_folder,
        max_length=recipe.data.max_length,
        image_aspect_ratio=recipe.data.image_aspect_ratio,
        bad_images=bad_images or recipe.data.bad_images,
        packing="flat" if "flash" in attention_of(recipe, "language") else "rows",
        substitutes=substitutes,
    )
    if base.own_pictures:  # also on one device: a step of texts alone is the same on any number
        collate.always_shows_images = True
    return collate


def strict_collator(recipe: Recipe, base: Base, processor: Any) -> RecordCollator[Any]:
    """Return a collator that raises the error of every record, for checks and counts."""
    if not base.own_pictures and recipe.template == OWN:  # else the processor has the template
        try:
            own_template(split_processor(processor)[0])
        except UserError:
            hint = f"use another template, one of: {', '.join(TEMPLATES)}"
            message = f"{OWN} does not work: {recipe.model} has no chat template"
            raise UserError(message, code="template-missing", where=Key.of("template"), hint=hint) from None
    return collator(recipe, base, processor, bad_images="raise")


def warnings_of(collator: RecordCollator[Any]) -> list[str]:
    return [
        f"{count:,} times while training: {WHAT_HAPPENED[event]}" for event, count in collator.counts().items() if count
    ]


def lengths(recipe: Recipe, collate: RecordCollator[Any], records: Sequence[Record]) -> list[int] | None:
    if not (recipe.data.packing or recipe.train.get("train_sampling_strategy") == "group_by_length"):
        return None
    beside = Path(recipe.data.path) if isinstance(recipe.data.path, str) else None
    return lengths_of(records, collate, beside=beside)


def packed(recipe: Recipe, records: Sequence[Record], lengths: Sequence[int]) -> tuple[PackedRecords, str]:
    capacity = 2 * recipe.data.max_length
    seed = recipe.train.get("data_seed")
    rows = pack(lengths, capacity, value_of(recipe.train, "seed") if seed is None else seed)
    share = fill(rows, lengths, capacity)
    return PackedRecords(records, rows), f"packed into {len(rows):,} rows of {capacity:,} tokens, {share:.1%} full"


def check(collate: RecordCollator[Any], recipe: Recipe, data: RunData) -> None:
    """Check the records with a `strict_collator`, before the weights of the base load."""
    for part, checked in (("train", data.train), ("eval", data.evaluation or ())):
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
        # A processor reads the images of these records, so it reads a sample: one in `step`.
        step = -(-len(checked) // FIRST) or 1
        _require_some(collate.require_usable, checked[::step])


def usable(collate: RecordCollator[Any], records: Sequence[Record]) -> list[Record]:
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


def _require_written(collate: RecordCollator[Any], records: Sequence[Record]) -> None:
    """Raise DataError for a record that the template rejects.

    The first records are read, the first of each form (what chat templates decide by: roles, pictures, videos), and
    those whose marks or texts may be wrong.
    """
    seen: set[object] = set()
    for number, record in enumerate(records):
        form = tuple((turn.role, IMAGE in turn.text, turn.keys != "") for turn in record.turns), len(record.videos)
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


def process_settings(args: TrainingArguments) -> dict[str, Any]:
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.to_dict().get("dataloader_multiprocessing_context"),  # not in transformers 5.6
        "timeout": TIMEOUT if args.dataloader_num_workers else 0,
        "worker_init_fn": start_process,
    }


def guarded(loader: Any) -> Any:
    inner = loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader
    inner.collate_fn = CountingCollator(inner.collate_fn)
    if inner.num_workers:
        inner.timeout = TIMEOUT
        inner.worker_init_fn = partial(start_process, then=inner.worker_init_fn)
    return loader


def start_process(number: int, then: Callable[[int], None] | None = None) -> None:
    """Let a loader process ignore SIGTERM, except from the main process; then call `then` with its number.

    Schedulers and torchrun send SIGTERM to all processes of a job. The main process then needs batches to end its step
    and save it. At its own end it sends SIGTERM to loader processes that hang.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_main_process, daemon=True).start()
    if then is not None:
        then(number)


def _end_with_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def stream_of(recipe: Recipe, args: TrainingArguments) -> RecordStream:
    assert recipe.data.path is not None
    return record_stream(
        sources_of(recipe.data.path),
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle_buffer=recipe.data.shuffle_buffer,
        rank=args.process_index,
        world_size=args.world_size,
        num_workers=args.dataloader_num_workers,
    )


def stream_loader(stream: IterableDataset[Any], collator: Any, args: TrainingArguments, checkpoint: Path | None) -> Any:
    """Return the loader of a stream; it continues at the position stored in `checkpoint`."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata calls a deprecated function of torch
        result = StatefulDataLoader(
            stream,
            batch_size=args.train_batch_size,
            collate_fn=CountingCollator(collator),
            # A loader draws a seed when it starts. A resumed run has drawn it before its random states were saved.
            generator=None if checkpoint is None else torch.Generator(),
            **process_settings(args),
        )
    if checkpoint is not None:
        path = checkpoint / _position_file(args)
        if not path.is_file():
            raise UserError(
                f"{path.name} is missing; it holds the position of this process in the stream",
                where=str(checkpoint),
                hint="resume from another checkpoint, with as many processes as before",
            )
        result.load_state_dict(read_weights(path))
    return result


def save_position(loader: Any, folder: Path, args: TrainingArguments) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(loader.state_dict(), folder / _position_file(args))


def _position_file(args: TrainingArguments) -> str:
    return f"stream_state_{args.process_index}.pth"
