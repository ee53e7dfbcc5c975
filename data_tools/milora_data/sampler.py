"""Group records of similar length into batches, which reduces padding.

LLaVA's group_by_modality_length sorts by the number of words and ignores pictures; here a picture counts as its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler

CHUNKS_PER_POOL = 50  # batches that are sorted together: enough for similar lengths, and still well shuffled


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
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0
        self.kinds = kinds
        self._done = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; accelerate calls it."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of indices yielded in it, for `load_state_dict`."""
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
        """Return the indices of an epoch."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        indices = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        incomplete: list[int] = []
        for group in self._groups(indices):
            for start in range(0, len(group), self.batch_size * CHUNKS_PER_POOL):
                together = sorted(group[start : start + self.batch_size * CHUNKS_PER_POOL], key=self._negative_length)
                batches += [together[i : i + self.batch_size] for i in range(0, len(together), self.batch_size)]
            if batches and len(batches[-1]) < self.batch_size:
                incomplete += batches.pop()  # records of incomplete batches come last
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [index for number in order for index in batches[number]] + sorted(incomplete, key=self._negative_length)

    def _groups(self, indices: Sequence[int]) -> list[list[int]]:
        if self.kinds is None:
            return [list(indices)]
        groups: dict[object, list[int]] = {}
        for index in indices:
            groups.setdefault(self.kinds[index], []).append(index)
        return list(groups.values())

    def _negative_length(self, index: int) -> int:
        return -self.lengths[index]
