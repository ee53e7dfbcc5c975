"""The order of the training records: a new shuffle for every epoch, which depends on a seed alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def shuffled(num_records: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield an endless stream of `batch_size` record indices; the incomplete last batch of an epoch is dropped.

    >>> next(shuffled(4, 4, seed=0)) == next(shuffled(4, 4, seed=0))
    True
    """
    assert batch_size <= num_records
    generator = torch.Generator().manual_seed(seed)
    while True:
        order: list[int] = torch.randperm(num_records, generator=generator).tolist()
        for start in range(0, num_records - batch_size + 1, batch_size):
            yield order[start : start + batch_size]
