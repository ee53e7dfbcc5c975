"""The calibration batches of a run: texts that the base model writes, text files, pictures with captions.

By default no data is needed: the base model writes texts itself, and a vision-language model describes pictures of the
training set. Texts and captions are cached by a hash of the weights, since writing them takes most of the time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationMixin
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_data.assets import cache_dir
from milora_data.batches.record_collator import RecordCollator
from milora_data.pictures.files import ImageError, content_of, load_image, place_of
from milora_data.records.record import IMAGE, Record, Turn
from milora_data.stream.sources import load_records
from milora_vl.common.atomic_write import write_json
from milora_vl.common.errors import Key, UserError, first_line
from milora_vl.common.progress import progress_bar
from milora_vl.core.calibration.cache import weights_digest
from milora_vl.core.calibration.gradients import RECORDS
from milora_vl.core.calibration.texts import LENGTH, ROWS, SEED, sampled_rows
from milora_vl.core.policy import Target
from milora_vl.core.weights.distributed import gather, rank_and_world_size
from milora_vl.core.weights.matrices import gathered_in_forward
from milora_vl.forgetting.text import ends_of, general_text, padded_batches, text_blocks
from milora_vl.models import loading
from milora_vl.models.base import Base
from milora_vl.models.generate import Prompt, generate
from milora_vl.train import collators
from milora_vl.train.plan.screen import Screen
from milora_vl.train.recipe.schema import Recipe

PART = 16  # texts or captions that are cached together: what an interrupted calibration does not write again
HELD_OUT_TEXTS = 8  # more than the recipe asks for; after 48 texts they are the batch that checks the shares
CAPTION_TOKENS = 32
QUESTION = "Write a short summary of the picture."  # no question of the picture probe of forgetting
MOST_TOKENS = 65_536  # of text files
MOST_RECORDS = 512  # of data
NGRAM = 12  # words in a row that two texts share only if one is copied
_VERSION = 3  # increase it if equal settings can give other texts


@dataclass(frozen=True)
class _Sources:
    """What the sources of a run read and write."""

    recipe: Recipe
    model: Any
    processor: Any
    screen: Screen

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer of the model."""
        return loading.split_processor(self.processor)[0]

    @cached_property
    def weights(self) -> str:
        """Return the hash of the weights."""
        return weights_digest(self.model)


@dataclass(frozen=True)
class Texts:
    """What the base knows: rows of ids, each with the name of its text, and records, each list with its collator."""

    rows: list[tuple[str, list[int]]]
    records: list[tuple[RecordCollator[Any], Sequence[Record]]]
    tokenizer: Any

    def batches(self, size: int = ROWS) -> list[Mapping[str, Tensor]]:
        """Return batches of at most `size`, arguments of the model's forward."""
        found: list[Mapping[str, Tensor]] = [batch.inputs for batch in padded_batches(self.rows, size, self.tokenizer)]
        for collate, records in self.records:
            found += _collated(collate, records, size)
        return found


def make_texts(
    recipe: Recipe, base: Base, model: nn.Module, processor: Any, records: Sequence[Record], screen: Screen
) -> Texts:
    """Return the calibration texts and captions of a run.

    `records` are the training records. All processes get the texts of the first one. Raises UserError for a model that
    cannot write text, for files that share text with the probe of forgetting, and without anything to calibrate with.
    """
    settings, sources = recipe.calibration, _Sources(recipe, model, processor, screen)
    rows = _text_rows(sources)
    if settings.num_samples:
        rows += _written_rows(sources, settings.num_samples)
    collate = collators.collator(recipe, base, processor)
    found: list[tuple[RecordCollator[Any], Sequence[Record]]] = []
    if settings.num_pictures and base.reads_pictures:
        pictured = with_pictures(records, settings.num_pictures)
        if settings.pictures and not pictured:
            screen.warn("calibration.pictures has no effect: no training record has a picture")
        readable = [record for record in pictured if _is_readable(collate.image_folder, record)]
        found.append((collate, _captioned(sources, readable, collate.image_folder)))
    elif settings.pictures:
        screen.warn("calibration.pictures has no effect: this model has no vision tower")
    if settings.data is not None:
        own = list(islice(load_records(settings.data), MOST_RECORDS))
        if not own:
            raise _empty(f"{settings.data} has no records to calibrate with", Key.of("calibration.data"))
        for record in own:
            _refuse_probe_text(" ".join(turn.text for turn in record.turns), record.source, Key.of("calibration.data"))
        found.append((collators.collator(_with_images_of(recipe, settings.image_folder), base, processor), own))
    if not rows and not any(records for _, records in found):
        raise _empty("there is no text and no picture to calibrate with", Key.of("calibration"))
    return Texts(rows, found, sources.tokenizer)


def task_batches(
    recipe: Recipe, base: Base, processor: Any, targets: Sequence[Target], records: Sequence[Record]
) -> list[Mapping[str, Tensor]] | None:
    """Return training records with labels, drawn at random; None if no rule has `method: gradient`.

    Each is a batch of its own: a backward of the base needs no more memory than any training step.
    """
    if not any(target.method == "gradient" for target in targets):
        return None
    generator = torch.Generator().manual_seed(SEED)
    collate = collators.collator(recipe, base, processor, records[:100])
    chosen = [records[place] for place in torch.randperm(len(records), generator=generator)[:RECORDS].tolist()]
    return [collate([record]) for record in chosen if _is_readable(collate.image_folder, record)]


def _empty(message: str, where: Key) -> UserError:
    return UserError(
        message,
        code="calibration-empty",
        where=where,
        hint="name files with text, or remove the key: the base model then writes texts itself",
    )


def _with_images_of(recipe: Recipe, folder: str | None) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"image_folder": folder})})


def _text_rows(sources: _Sources) -> list[tuple[str, list[int]]]:
    """Return blocks of the text files: (file, ids)."""
    texts = {}
    for name in sources.recipe.calibration.text or ():
        try:
            texts[name] = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read {name}: {first_line(error)}",
                code="file-unreadable",
                where=Key.of("calibration.text"),
                hint="name a file with text in UTF-8",
            ) from None
    if not texts:
        return []
    for name, text in texts.items():
        _refuse_probe_text(text, name, Key.of("calibration.text"))
    try:
        return text_blocks(texts, sources.tokenizer, num_tokens=MOST_TOKENS, block_length=LENGTH)
    except ValueError:
        raise _empty("the text files are empty", Key.of("calibration.text")) from None


def _written_rows(sources: _Sources, count: int) -> list[tuple[str, list[int]]]:
    """Return texts that the base model writes: (name, ids). Texts that it recites from the probe are left out."""
    model, tokenizer = sources.model, sources.tokenizer
    if not isinstance(model, GenerationMixin):
        raise UserError(
            f"a {type(model).__name__} cannot write calibration texts",
            code="calibration-cannot-generate",
            where=Key.of("calibration"),
            hint="set  calibration: {text: [FILE]}  or  {data: FILE}",
        )
    total = count + HELD_OUT_TEXTS
    rows: list[list[int]] = []
    with _bar("writing calibration texts", total * (LENGTH - 1), "tokens") as bar:
        for number, begin in enumerate(range(0, total, PART)):
            part = min(PART, total - begin)

            def write(seed: int = SEED + number, part: int = part) -> list[list[int]]:
                ends = ends_of(tokenizer)
                return sampled_rows(
                    model, *ends, count=part, length=LENGTH, batch_size=part, seed=seed, on_tokens=bar.update
                )

            rows += _cached(sources, f"texts {number} {part} {LENGTH}", write)
            bar.update((begin + part) * (LENGTH - 1) - bar.n)  # what the cache had
    kept = [row for row in rows if not shares_probe_text(tokenizer.decode(row, skip_special_tokens=True))]
    return [(f"sample {number}", row) for number, row in enumerate(kept)]


def with_pictures(records: Sequence[Record], count: int) -> list[Record]:
    """Return `count` records with a picture each, evenly spread over the training set; fewer if it has fewer.

    Of a record with several pictures the first one counts.
    """
    by_picture = {record.images[:1]: replace(record, images=record.images[:1]) for record in records if record.images}
    unique = list(by_picture.values())
    return unique[:: max(1, len(unique) // count)][:count]


def _is_readable(folder: Path, record: Record) -> bool:
    """Return whether the picture of a record can be read; the training handles others as `bad_images` says."""
    try:
        return all(load_image(place_of(folder, name)) for name in record.images)
    except ImageError:
        return False


def _captioned(sources: _Sources, records: Sequence[Record], folder: Path) -> list[Record]:
    """Return records with the pictures of `records`, from `folder`, and captions of the base model."""
    recipe = sources.recipe
    turn = Turn("user", f"{IMAGE}\n{QUESTION}")
    pictures = [tuple(place_of(folder, name) for name in record.images) for record in records]

    captions: list[str] = []
    with _bar("describing calibration pictures", len(records), "pictures") as bar:
        for begin in range(0, len(pictures), PART):
            part = pictures[begin : begin + PART]

            def write(part: Sequence[tuple[str | Path, ...]] = part) -> list[str]:
                answers = generate(
                    sources.model,
                    sources.processor,
                    [Prompt((turn,), paths) for paths in part],
                    template=recipe.template,
                    max_new_tokens=CAPTION_TOKENS,
                    image_aspect_ratio=recipe.data.image_aspect_ratio,
                    on_batch=lambda places, _: bar.update(len(places)),
                )
                return [*answers]

            digests = [[_digest(path) for path in paths] for paths in part]
            asked = f"{recipe.template} {recipe.data.image_aspect_ratio} {CAPTION_TOKENS} {QUESTION}"
            captions += _cached(sources, f"captions {asked} {digests}", write)
            bar.update(begin + len(part) - bar.n)
    return [
        replace(record, turns=(turn, Turn("assistant", caption)))
        for record, caption in zip(records, captions, strict=True)
    ]


def _digest(path: str | Path) -> str:
    """Return the hash of a picture's bytes, since other data has pictures of the same name; without bytes, the name."""
    try:
        return xxhash.xxh3_128_hexdigest(content_of(path))
    except (OSError, ValueError):  # the model's own reading raises an error that names the picture
        return f"unreadable {path}"


def _collated(collate: RecordCollator[Any], records: Sequence[Record], size: int) -> list[Mapping[str, Tensor]]:
    """Return batches of the records, those with pictures first. The collator gives text a blank picture: not here."""
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


def _refuse_probe_text(text: str, source: str, where: Key) -> None:
    if shares_probe_text(text):
        raise UserError(
            f"{source} contains text of the probe that measures forgetting, so the measure would be biased",
            code="calibration-probe-text",
            where=where,
            hint="use another text",
        )


@lru_cache(maxsize=1)
def _probe_grams() -> frozenset[tuple[str, ...]]:
    return frozenset(gram for book in general_text().values() for gram in _grams(book))


def _grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def _cached(sources: _Sources, settings: str, write: Callable[[], list[Any]]) -> list[Any]:
    """Return what the first process reads from the cache or, if it misses there, writes; the same in every process.

    All processes write, because a model that ZeRO-3 partitions needs all of them. It has no hash, and so no cache.
    """
    is_whole = not is_deepspeed_zero3_enabled()
    file = _cache_file(sources, settings) if is_whole else Path()
    is_first = rank_and_world_size()[0] == 0
    stored = gather(_read(file) if is_whole and is_first else None)[0]
    if stored is not None:
        return list(stored)
    with gathered_in_forward(sources.model):
        written = list(gather(write())[0])
    if is_whole and is_first:
        _store(file, written, sources.screen)
    return written


def _cache_file(sources: _Sources, settings: str) -> Path:
    folder = Path(sources.recipe.factor_cache or cache_dir() / "calibration")
    key = hashlib.sha256(f"{_VERSION} {sources.weights} {settings}".encode()).hexdigest()[:32]
    return folder / f"calibration-{key}.json"


def _read(file: Path) -> list[Any] | None:
    try:
        return list(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _store(file: Path, written: list[Any], screen: Screen) -> None:
    try:
        write_json(file, written)
    except OSError as error:
        screen.warn(f"calibration texts are not cached in {file.parent}: {error}")


def _bar(what: str, total: int, unit: str) -> tqdm[Any]:
    return progress_bar(what, total, unit, is_shown=rank_and_world_size()[0] == 0)
