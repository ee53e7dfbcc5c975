"""Batches of records of similar length: less padding, so less of a step is spent on nothing.

LLaVA's group_by_modality_length sorts by words and counts no picture; here a picture counts as its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from .records import Record

CHUNKS_PER_POOL = 50  # of so many batches the records are sorted together: long enough to group, short enough to mix
CHARACTERS_PER_TOKEN = 4


def estimated_length(record: Record, image_tokens: int) -> int:
    """Return about how many tokens a record takes, without a tokenizer: for sorting, not for counting.

    >>> from milora_data.records import Turn
    >>> estimated_length(Record("a", ("a.png",), (Turn("user", "<image>\\nWhat is it?"),), "x:1", {}), 576)
    580
    """
    return sum(len(turn.text) for turn in record.turns) // CHARACTERS_PER_TOKEN + len(record.images) * image_tokens


class LengthGroupedSampler(Sampler[int]):
    """Every index once, so that `batch_size` consecutive ones have similar lengths; the batches in random order.

    batch_size: records of one optimizer step on all devices. The order depends on `seed` and the epoch alone, so it is
    the same on every rank and in a resumed run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; accelerate calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        indices = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.batch_size * CHUNKS_PER_POOL
        batches: list[list[int]] = []
        for start in range(0, len(indices), pool):
            together = sorted(indices[start : start + pool], key=lambda i: -self.lengths[i])
            batches += [together[i : i + self.batch_size] for i in range(0, len(together), self.batch_size)]
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []  # a short batch comes last
        order = torch.randperm(len(batches), generator=generator).tolist()
        for batch in [*(batches[i] for i in order), *last]:
            yield from batch
