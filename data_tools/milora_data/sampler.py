"""Batches of records of similar length: less padding, so less of a step is spent on nothing.

LLaVA's group_by_modality_length sorts by words and counts no picture; here a picture counts as its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler

CHUNKS_PER_POOL = 50  # of so many batches the records are sorted together: long enough to group, short enough to mix


class LengthGroupedSampler(Sampler[int]):
    """Every index once, so that `batch_size` consecutive ones have similar lengths; the batches in random order.

    batch_size: records of one optimizer step on all devices. `kinds`, one for each index (with a picture or without,
    say), are not mixed in a batch, but for the last records of an epoch. The order depends on `seed` and the epoch
    alone, so it is the same on every rank and in a resumed run; `state_dict` says how far it is.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int = 0, *, kinds: Sequence[object] | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if kinds is not None and len(kinds) != len(lengths):
            raise ValueError(f"{len(kinds)} kinds for {len(lengths)} lengths")
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0
        self.kinds = kinds
        self._done = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; accelerate calls it."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return epoch and number of indices given out in it, for `load_state_dict`."""
        return {"epoch": self.epoch, "done": self._done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another sampler of the same lengths and seed was: the next iteration gives what is due."""
        self.epoch, self._done = state["epoch"], state["done"]

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        for index in order[self._done :]:
            self._done += 1
            yield index
        self._done = 0

    def order(self, epoch: int) -> list[int]:
        """Return the indices of an epoch."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        indices = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        rest: list[int] = []
        for group in self._groups(indices):
            for start in range(0, len(group), self.batch_size * CHUNKS_PER_POOL):
                together = sorted(group[start : start + self.batch_size * CHUNKS_PER_POOL], key=self._shorter)
                batches += [together[i : i + self.batch_size] for i in range(0, len(together), self.batch_size)]
            if batches and len(batches[-1]) < self.batch_size:
                rest += batches.pop()  # short batches come last, together
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [index for number in order for index in batches[number]] + sorted(rest, key=self._shorter)

    def _groups(self, indices: Sequence[int]) -> list[list[int]]:
        if self.kinds is None:
            return [list(indices)]
        groups: dict[object, list[int]] = {}
        for index in indices:
            groups.setdefault(self.kinds[index], []).append(index)
        return list(groups.values())

    def _shorter(self, index: int) -> int:
        return -self.lengths[index]
