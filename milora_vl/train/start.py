"""The stage before the first step: texts and captions of the base, protected inputs, the adapter on the base.

By default no data is needed: the base model writes texts itself, and a vision-language model describes pictures of the
training set. They are written in batches with a generator each, which the processes share. The file TEXTS of the run
keeps them for the run itself, a cache by a hash of the weights for other runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, TypeAdapter
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_data.assets import cache_dir
from milora_data.batches.record_collator import RecordCollator
from milora_data.check import KEY_BYTES
from milora_data.keys import FileKeys, file_key, record_key
from milora_data.pictures.load import ImageError, load_image
from milora_data.records.record import IMAGE, Record, Turn
from milora_vl.common.atomic_write import write_json
from milora_vl.common.cli.console import amount, duration_text
from milora_vl.common.cli.screen import Screen
from milora_vl.common.errors import DataError, Key, UserError
from milora_vl.common.progress import progress_bar
from milora_vl.core.adapter.apply import apply_targets
from milora_vl.core.adapter.earlier import Earlier, hold
from milora_vl.core.adapter.load import load_checkpoint
from milora_vl.core.adapter.lora import base_model_of
from milora_vl.core.adapter.peft_model import MiloraMixin
from milora_vl.core.adapter.sidecar import FILE_NAME
from milora_vl.core.calibration import CAPTIONS, TEXTS
from milora_vl.core.calibration.bases import Batches, Calibration
from milora_vl.core.calibration.texts import HELD_OUT_TEXTS, LENGTH, ROWS, SEED, rows_at_once, sampled_rows
from milora_vl.core.policy import Target
from milora_vl.core.policy.resolve import frozen_towers
from milora_vl.core.policy.towers import find_towers
from milora_vl.core.weights.distributed import gather_objects, gathered, rank_and_world_size, result_or_error
from milora_vl.core.weights.tensor_files import shared_digest
from milora_vl.forgetting.measure import ends_of, general_text, padded_batches
from milora_vl.models.base import Base, split_processor
from milora_vl.models.devices import measured_flops
from milora_vl.models.generate import Prompt, generate
from milora_vl.models.projector import load_projector
from milora_vl.train.counts import A100, CPU, NUM_RECORDS, SMOKE_NOTE, SMOKE_STEPS, part_of, trained_sizes
from milora_vl.train.data import calibration_records, collator
from milora_vl.train.plan import Run
from milora_vl.train.resume import EarlierRecords, require_same
from milora_vl.train.settings import Recipe
from milora_vl.train.trainer import CheckpointKind

CAPTION_TOKENS = 32
PROMPT_TOKENS = 128  # of system text, question and caption
QUESTION = "Write a short summary of the picture."  # no question of the picture probe of forgetting
MOST_TOKENS = 65_536  # of a picture and its caption
NGRAM = 12  # words in a row that two texts share only if one is copied
_VERSION = 5  # increase it if equal settings can give other texts
_TokenRows = list[Annotated[list[NonNegativeInt], Field(min_length=1)]]


@dataclass(frozen=True)
class _Sources:
    recipe: Recipe
    base: Base
    model: Any
    processor: Any
    screen: Screen

    @property
    def tokenizer(self) -> Any:
        return split_processor(self.processor)[0]

    @cached_property
    def weights(self) -> str:
        return shared_digest(self.model)


@dataclass(frozen=True)
class Texts:
    """What the base knows: rows of ids, each with the name of its text, and records, each list with its collator.

    `tasks` has records of its earlier tasks, a list for each run.
    """

    rows: list[tuple[str, list[int]]]
    records: list[tuple[RecordCollator[Any], Sequence[Record]]]
    tasks: list[tuple[RecordCollator[Any], Sequence[Record]]]
    made_by: _Sources
    content: dict[str, Any]  # of the file TEXTS, for a resumed run

    def sources(self, size: int = ROWS) -> Mapping[str, Batches]:
        """Return the sources of a calibration, batches of at most `size`: `base`, and each earlier task."""
        found = {"base": self.batches(size)}
        found |= {f"task {number}": _collated(*task, size) for number, task in enumerate(self.tasks, start=1)}
        return {name: batches for name, batches in found.items() if batches}

    def batches(self, size: int = ROWS) -> list[Mapping[str, Tensor]]:
        """Return batches of what the base writes and sees, arguments of the model's forward."""
        found: list[Mapping[str, Tensor]] = [
            batch.inputs for batch in padded_batches(self.rows, size, self.made_by.tokenizer)
        ]
        for collate, records in self.records:
            found += _collated(collate, records, size)
        return found


def make_texts(
    recipe: Recipe,
    base: Base,
    model: nn.Module,
    processor: Any,
    records: Sequence[Record],
    screen: Screen,
    steps: int = SMOKE_STEPS,
    earlier: EarlierRecords | None = None,
    stored: Mapping[str, Any] | None = None,
) -> Texts:
    """Return the calibration texts and captions of a run of `steps` steps, and a sample of the `earlier` records.

    `records` are the training records. A resumed run has its texts and captions `stored`. Raises UserError for a model
    that cannot write text, without anything to calibrate with, and for a resumed run whose records or pictures have
    changed. Nothing of it shares text with the probe of forgetting.
    """
    settings, sources = recipe.calibration, _Sources(recipe, base, model, processor, screen)
    count = part_of(settings.num_samples + HELD_OUT_TEXTS, steps) if settings.num_samples else 0
    rows = stored["rows"] if stored is not None else _written_rows(sources, count) if count else []
    collate = collator(_with_data(recipe, max_length=MOST_TOKENS), base, processor)  # no caption is cut
    found: list[tuple[RecordCollator[Any], Sequence[Record]]] = []
    captions: list[str] = []
    if settings.num_pictures and base.reads_pictures:
        pictured = with_pictures(records, part_of(settings.num_pictures, steps), collate.image_folder)
        if settings.pictures and not pictured:
            screen.warn("calibration.pictures has no effect: no training record has a picture")
        readable = [record for record in pictured if _is_readable(collate.image_folder, record)]
        captions = _captions(sources, readable, collate.image_folder) if stored is None else stored["captions"]
        asked = Turn("user", f"{IMAGE}\n{QUESTION}")
        turns = ((asked, Turn("assistant", caption)) for caption in captions)
        found.append((collate, [replace(record, turns=of) for record, of in zip(readable, turns, strict=False)]))
    elif settings.pictures:
        screen.warn("calibration.pictures has no effect: this model has no vision tower")
    if settings.data is not None:
        own = [record for record in calibration_records(settings) if not _is_of_probe(record)]
        found.append((collator(_with_data(recipe, image_folder=settings.image_folder), base, processor), own))
    of_tasks: list[tuple[RecordCollator[Any], Sequence[Record]]] = []
    for of_task, of_run, order in earlier.found if earlier else ():
        collate = collator(of_task, base, processor)
        drawn = (of_run[index] for index in order)
        usable = (record for record in drawn if _is_usable(collate, record) and not _is_of_probe(record))
        of_tasks.append((collate, list(islice(usable, part_of(NUM_RECORDS, steps)))))
    if not rows and not any(records for _, records in [*found, *of_tasks]):
        message, hint = "there is no text and no picture to calibrate with", "set  calibration: {samples: 48}"
        raise UserError(message, where=Key.of("calibration"), hint=hint)
    shown = [(collate.image_folder, record) for collate, of in (*found, *of_tasks) for record in of]
    keys = b"".join(bytes.fromhex(record_key(one, FileKeys(folder)))[:KEY_BYTES] for folder, one in shown)
    if stored is not None:
        require_same("records or pictures of the calibration", stored["records"], keys, lambda n: shown[n][1].source)
    content = {"rows": rows, "captions": captions, "records": keys.hex()}
    return Texts(rows, found, of_tasks, sources, content)


def show_start(run: Run, model: Any, steps: int, screen: Screen) -> None:
    """Say about how long the start takes, before its first slow part, if no earlier start has cached anything."""
    on_cpu = model.device.type == "cpu"
    flops = measured_flops() if on_cpu else None
    start = run.start_seconds(steps, flops, run.base.tokens_of_a_picture or LENGTH)
    if start:
        where = CPU if on_cpu else A100
        screen.say(f"start  about {duration_text(start)} before the first step, on {where}, if nothing is cached")
    if run.is_smoke_test(steps):
        screen.say(SMOKE_NOTE)


def _with_data(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=values)})


def _written_rows(sources: _Sources, count: int) -> list[tuple[str, list[int]]]:
    """Return texts that the base model writes: (name, ids). Texts that it recites from the probe are left out."""
    model, tokenizer = sources.model, sources.tokenizer
    if not isinstance(model, GenerationMixin):
        message = f"a {type(model).__name__} cannot write calibration texts"
        hint = "set  calibration: {data: FILE}"
        raise UserError(message, where=Key.of("calibration"), hint=hint)
    at_once = rows_at_once(model, LENGTH)
    parts = [min(at_once, count - begin) for begin in range(0, count, at_once)]

    def write(number: int, on_work: Callable[[int], object]) -> list[list[int]]:
        at = {"count": parts[number], "length": LENGTH, "batch_size": parts[number], "seed": SEED + number}
        return sampled_rows(model, *ends_of(tokenizer), **at, on_tokens=on_work)

    jobs = [_Job(f"{number} {part} {LENGTH}", part, LENGTH - 1) for number, part in enumerate(parts)]
    rows = _cached(sources, "texts", _TokenRows, TEXTS, "tokens", jobs, write)
    kept = [row for row in rows if not shares_probe_text(tokenizer.decode(row, skip_special_tokens=True))]
    return [(f"sample {number}", row) for number, row in enumerate(kept)]


def with_pictures(records: Sequence[Record], count: int, folder: Path) -> list[Record]:
    """Return `count` records with a picture each, evenly spread over the training set; fewer if it has fewer.

    Of a record with several pictures the first one counts, of records with equal pictures one.
    """
    found, key_of = dict[str, Record](), FileKeys(folder)
    indices = [index for index, record in enumerate(records) if record.images]
    step = max(1, len(indices) // count)
    for index in chain.from_iterable(indices[begin::step] for begin in range(step)):
        record = replace(records[index], images=records[index].images[:1])
        found.setdefault(key_of(record.images[0]), record)
        if len(found) == count:
            break
    return list(found.values())


def _is_usable(collate: RecordCollator[Any], record: Record) -> bool:
    try:
        collate.require_usable(record)
    except DataError:
        return False
    return _is_readable(collate.image_folder, record)


def _is_readable(folder: Path, record: Record) -> bool:
    """Return whether the picture of a record can be read; the training handles others as `bad_images` says."""
    try:
        return all(map(load_image, record.within(folder).images))
    except ImageError:
        return False


def _is_of_probe(record: Record) -> bool:
    return shares_probe_text(" ".join(turn.text for turn in record.turns))


def _captions(sources: _Sources, records: Sequence[Record], folder: Path) -> list[str]:
    recipe = sources.recipe
    pictures = [record.within(folder).images for record in records]
    at_once = rows_at_once(sources.model, PROMPT_TOKENS + (sources.base.tokens_of_a_picture or recipe.data.max_length))
    parts = [pictures[begin : begin + at_once] for begin in range(0, len(pictures), at_once)]

    def write(number: int, on_work: Callable[[int], object]) -> list[str]:
        answers = generate(
            sources.model,
            sources.processor,
            [Prompt((Turn("user", f"{IMAGE}\n{QUESTION}"),), paths) for paths in parts[number]],
            template=recipe.template,
            max_new_tokens=CAPTION_TOKENS,
            image_aspect_ratio=recipe.data.image_aspect_ratio,
            batch_size=at_once,
            on_batch=lambda indices, _: on_work(len(indices)),
        )
        return list(map(str, answers))

    asked = f"{recipe.template} {recipe.data.image_aspect_ratio} {CAPTION_TOKENS} {QUESTION}"
    jobs = [_Job(f"{asked} {[[file_key(path) for path in paths] for paths in part]}", len(part)) for part in parts]
    return _cached(sources, "captions", list[str], CAPTIONS, "pictures", jobs, write)


def _collated(collate: RecordCollator[Any], records: Sequence[Record], size: int) -> list[Mapping[str, Tensor]]:
    found: list[Mapping[str, Tensor]] = []
    for group in ([r for r in records if r.images], [r for r in records if not r.images]):
        for start in range(0, len(group), size):
            batch: dict[str, Tensor] = collate(group[start : start + size])
            unused = {"labels"} if group[0].images else {"labels", "pixel_values", "image_sizes"}
            found.append({name: value for name, value in batch.items() if name not in unused})
    return found


def shares_probe_text(text: str) -> bool:
    """Return whether a text has twelve words in a row that a probe text of forgetting has."""
    return not _probe_grams().isdisjoint(_grams(text))


@lru_cache(maxsize=1)
def _probe_grams() -> frozenset[tuple[str, ...]]:
    return frozenset(gram for book in general_text().values() for gram in _grams(book))


def _grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


@dataclass(frozen=True)
class _Job:
    """A batch of texts or captions: what they depend on beside the weights, their number, and the work of each."""

    settings: str
    count: int
    work: int = 1


def _cached(
    sources: _Sources,
    what: str,
    kind: Any,
    title: str,
    unit: str,
    jobs: Sequence[_Job],
    write: Callable[[int, Callable[[int], object]], list[Any]],
) -> list[Any]:
    """Return the results of all jobs, the same in every process: from the cache of the first one, or written.

    The processes share the jobs. `write` gets the number of a job and what to call with the work that is done; it
    returns a value of the type `kind`.
    """
    rank, processes = rank_and_world_size()
    keys = [sha256(f"{_VERSION} {sources.weights} {what} {job.settings}".encode()).hexdigest()[:32] for job in jobs]
    files = [cache_folder(sources.recipe) / f"calibration-{key}.json" for key in keys]
    found = gather_objects(
        [_read(file, kind, job.count) for file, job in zip(files, jobs, strict=True)] if rank == 0 else None
    )[0]
    if used := sum(map(len, filter(None, found))):
        sources.screen.say(f"{used} calibration {what} of an earlier start are used")
    missing = [number for number, one in enumerate(found) if one is None]
    if not missing:
        return list(chain(*found))
    with gathered(sources.model):
        mine, is_in_step = missing[rank::processes], is_deepspeed_zero3_enabled()  # gathers weights in each forward
        if is_in_step and len(mine) < len(missing[::processes]):
            mine.append(missing[0])
        total = sum(jobs[number].count * jobs[number].work for number in mine)
        with progress_bar(title, total, unit, is_shown=rank == 0) as bar:
            act = lambda: {number: write(number, bar.update) for number in mine}  # noqa: E731
            written = act() if is_in_step else result_or_error(act)
    for number, one in chain(*(part.items() for part in reversed(gather_objects(written)))):
        found[number] = one
    try:
        for number in missing if rank == 0 else ():
            write_json(files[number], found[number])
    except OSError as error:
        warnings.warn(f"calibration texts are not cached in {files[0].parent}: {error.strerror}", stacklevel=2)
    return list(chain(*found))


def cache_folder(recipe: Recipe) -> Path:
    return Path(recipe.factor_cache or cache_dir() / "calibration")


def _read(file: Path, kind: Any, count: int) -> list[Any] | None:
    """Return the `count` texts of an entry; None for a text that is missing or does not fit."""
    try:
        found: list[Any] = TypeAdapter(kind).validate_json(file.read_bytes(), strict=True)
    except (OSError, ValueError):
        return None
    return found if len(found) == count else None


@dataclass(frozen=True, slots=True)
class Built:
    model: Any
    targets: list[Target]
    checkpoint_kind: CheckpointKind
    sizes: dict[str, int]  # number of trained values by target
    frozen: list[str]  # towers without trained modules


def checkpoint_kind_of(targets: Sequence[Target]) -> CheckpointKind:
    if any(t.rank is not None for t in targets):
        return "adapter"
    return "projector" if all(t.tower == "projector" for t in targets) else "full"


def build_model(
    recipe: Recipe,
    base: nn.Module,
    targets: list[Target],
    checkpoint: Path | None,
    calibration: Calibration | None = None,
    dtype: torch.dtype = torch.float32,
    earlier: Earlier | None = None,
    weights: str | None = None,
) -> Built:
    """Apply the resolved policy, or load the adapter of `checkpoint`, else of the recipe, with its initial factors.

    `calibration` holds the batches for protected inputs. `dtype` is the data type of the trained weights. `earlier` is
    the update that the base of a new run holds, and `weights` the key of the base without it.
    """
    checkpoint_kind = checkpoint_kind_of(targets)
    adapter = checkpoint or (Path(recipe.adapter) if recipe.adapter else None)
    sizes = trained_sizes(targets, base)
    frozen = frozen_towers(base, targets)
    if checkpoint_kind == "adapter" and adapter is not None:
        model = load_checkpoint(base, adapter)
        _require_same_targets(adapter, targets, model.milora_targets if isinstance(model, MiloraMixin) else [])
        model.remember("default", replace(model.sidecars["default"], targets=targets))  # the rates of this run
    else:
        if earlier is not None:
            hold(base, earlier)
        model = apply_targets(
            base,
            targets,
            calibration=calibration,
            cache_dir=recipe.factor_cache,
            calibration_cache=cache_folder(recipe),
            weights=weights if earlier is None else None,
            progress=True,
        )
        if earlier is not None:
            model.earlier = earlier
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if checkpoint is not None and not is_deepspeed_zero3_enabled():  # there DeepSpeed loads its own shards
        _restore(model, checkpoint, checkpoint_kind)
    return Built(model, targets, checkpoint_kind, sizes, frozen)


def _require_same_targets(adapter: Path, targets: Sequence[Target], stored: Sequence[Target]) -> None:
    here, there = ({t.path: replace(t, learning_rate=None, weight_decay=None) for t in ts} for ts in (targets, stored))
    differ = sorted(path for path in here | there if here.get(path) != there.get(path))
    if differ:
        raise UserError(
            f"{FILE_NAME} and the rules of the recipe differ in {amount(len(differ), 'module')}, first {differ[0]}",
            code="adapter-other-settings",
            where=str(adapter),
            hint=f"restore the {FILE_NAME} and the recipe.yaml that belong to the adapter",
        )


def compile_blocks(model: nn.Module, options: Mapping[str, str]) -> None:
    """Compile each block of the language tower separately; equal blocks share their code.

    The loss in chunks, the vision tower and checkpointing stay outside. `options` are arguments of torch.compile.
    """
    base = base_model_of(model)
    for path in find_towers(base).stacks.get("language", ()):
        for block in base.get_submodule(path).children():
            block.compile(**options)


def _restore(model: Any, checkpoint: Path, checkpoint_kind: CheckpointKind) -> None:
    """Load the projector, or all weights by `from_pretrained`, which knows the names that transformers has changed."""
    if checkpoint_kind == "projector":
        load_projector(model, checkpoint)
    elif checkpoint_kind == "full":
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=torch.float32).state_dict())
