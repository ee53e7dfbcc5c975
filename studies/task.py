"""The interface of a study's task: base model, batches, loss, test, and a measurement of forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from milora_vl.core.calibration.bases import Calibration


@dataclass(frozen=True, slots=True)
class Measured:
    """The numbers of one training. `items` is the score of each test item, for paired tests; `more` other numbers."""

    validation_loss: float
    score: float
    items: Mapping[str, float]
    forgetting: float
    more: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """One task. A process builds it once for many trainings, so it holds everything that they share."""

    metric: str  # name of `score`, higher is better
    forgets: str  # name of `forgetting`, higher is worse

    def model(self) -> nn.Module:
        """Return a new copy of the base model on the CPU, ready for `apply_milora`."""
        ...

    def batches(self, batch_size: int, seed: int) -> Iterator[Any]:
        """Yield an endless stream of training batches, in an order that depends on `seed` alone."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of one batch."""
        ...

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Return `validation_loss` and `test_loss` of a model in eval mode, without gradients."""
        ...

    def measure(self, model: nn.Module) -> Measured:
        """Measure a tuned model in eval mode, without gradients."""
        ...

    def calibration(self) -> Calibration:
        """Return batches for rules that protect inputs: arguments of the model's forward. `measure` uses other data."""
        ...


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
