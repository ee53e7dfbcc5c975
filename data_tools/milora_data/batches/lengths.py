"""Lengths of records in tokens, images included: counted once, cached beside the data; a sampler by length.

LLaVA's group_by_modality_length sorts by the number of words and ignores pictures; here a picture counts as its tokens.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.labels import NoSupervisedTokens
from milora_data.keys import digest, file_key, record_key
from milora_data.pictures.load import ImageError, Picture, picture_size
from milora_data.records.record import Record
from milora_vl.common.atomic_write import atomic_file

log = logging.getLogger(__name__)

BATCHES_PER_POOL = 50  # batches that are sorted together: enough for similar lengths, and still well shuffled


def lengths_of(records: Sequence[Record], collate: RecordCollator[Any], *, beside: Path | None = None) -> list[int]:
    """Return the number of tokens of each record as `num_tokens`; shows a progress bar. One without answers counts 0.

    `beside` is the data file: the lengths are cached next to it (NAME.lengths-KEY.npy) and reused for the same records
    and settings; a read-only folder is not an error. Raises `DataError` like the collator.
    """
    cache = None if beside is None else beside.with_name(f"{beside.name}.lengths-{_key(records, collate)}.npy")
    if cache is not None and cache.is_file():
        lengths = np.load(cache)
    else:
        lengths = _counted(records, collate)
        if cache is not None:
            _save(cache, lengths)
    cut: list[int] = (lengths if collate.max_length is None else np.minimum(lengths, collate.max_length)).tolist()
    return cut


def _counted(records: Sequence[Record], collate: RecordCollator[Any]) -> np.ndarray:
    from tqdm import tqdm

    lengths = np.zeros(len(records), dtype=np.int64)
    bar = tqdm(records, "counting tokens", disable=None, file=sys.stderr, leave=False)
    for number, record in enumerate(bar):
        try:
            lengths[number] = collate.full_length(record)
        except NoSupervisedTokens:
            continue  # the collator skips it
    return lengths


def _key(records: Sequence[Record], collate: RecordCollator[Any]) -> str:
    """Return a hash of all that lengths depend on: settings, texts, and where they count, the sizes of pictures.

    A picture counts by its height and width, which its header has; a video by its bytes.
    """

    def key_of(picture: Picture) -> str | None:
        if not collate.length_by_size:
            return None
        try:
            return str(picture_size(picture.within(collate.image_folder)))
        except ImageError:
            return file_key(picture.within(collate.image_folder))

    return digest([collate.length_settings(), *(record_key(record, key_of) for record in records)])[:12]


def _save(path: Path, lengths: np.ndarray) -> None:
    try:
        with atomic_file(path) as part, part.open("wb") as file:
            np.save(file, lengths)
    except OSError as error:
        log.info("the lengths are not cached: %s", error)


class LengthGroupedSampler(Sampler[int]):
    """Yields each index once; `batch_size` consecutive indices have similar lengths, and batches are shuffled.

    batch_size: records of one optimizer step on all devices. `kinds` has one value per index, for example with or
    without a picture; a batch has one kind only, except for the last records of an epoch. The order depends only on
    `seed` and the epoch, so all ranks and a resumed run have the same order; `state_dict` holds the position.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int = 0, *, kinds: Sequence[object] | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if kinds is not None and len(kinds) != len(lengths):
            raise ValueError(f"{len(kinds)} kinds for {len(lengths)} lengths")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        numbers: dict[object, int] = {}
        numbered = None if kinds is None else (numbers.setdefault(kind, len(numbers)) for kind in kinds)
        self._kinds = None if numbered is None else np.fromiter(numbered, dtype=np.int64)
        self._done = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self._done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from the state of a sampler with the same lengths and seed; the next iteration yields the rest."""
        self.epoch, self._done = state["epoch"], state["done"]

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        for index in order[self._done :]:
            self._done += 1
            yield index
        self._done = 0

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        indices = torch.randperm(len(self.lengths), generator=generator).numpy()
        pools: list[np.ndarray] = []  # (num_batches, batch_size) each
        incomplete: list[np.ndarray] = []
        per_pool = self.batch_size * BATCHES_PER_POOL
        for group in self._groups(indices):
            for start in range(0, len(group), per_pool):
                together = self._longest_first(group[start : start + per_pool])
                full = len(together) - len(together) % self.batch_size
                pools.append(together[:full].reshape(-1, self.batch_size))
                incomplete.append(together[full:])  # records of incomplete batches come last
        batches = np.concatenate([np.empty((0, self.batch_size), dtype=np.int64), *pools])
        shuffled = batches[torch.randperm(len(batches), generator=generator).numpy()]
        last = self._longest_first(np.concatenate([np.empty(0, dtype=np.int64), *incomplete]))
        order: list[int] = np.concatenate([shuffled.ravel(), last]).tolist()
        return order

    def _groups(self, indices: np.ndarray) -> list[np.ndarray]:
        """Return the indices of each kind; kinds are in the order of their first index."""
        if self._kinds is None:
            return [indices]
        kinds = self._kinds[indices]
        present, first = np.unique(kinds, return_index=True)
        return [indices[kinds == kind] for kind in present[np.argsort(first)]]

    def _longest_first(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(-self.lengths[indices], kind="stable")]
