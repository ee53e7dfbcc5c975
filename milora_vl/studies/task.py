"""What a study trains and measures: a base model, batches, a loss, a test, and what may be forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Measured:
    """What came out of one training. `items`: the score of each test item, for paired tests; `more`: other numbers."""

    validation_loss: float
    score: float
    items: Mapping[str, float]
    forgetting: float
    more: Mapping[str, float] = field(default_factory=dict)


class Task(Protocol):
    """One task. It is built once in a process and trained on many times, so it holds what all trainings share."""

    metric: str  # what `score` is, higher is better
    forgets: str  # what `forgetting` is, higher is worse

    def model(self) -> nn.Module:
        """Return a fresh copy of the base model, on the CPU, as `apply_milora` takes it."""
        ...

    def batches(self, batch_size: int, seed: int) -> Iterator[Any]:
        """Yield batches of training records without end, in an order that `seed` alone decides."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of one batch."""
        ...

    def measure(self, model: nn.Module) -> Measured:
        """Measure a tuned model; `model` is in eval mode, no gradients are kept."""
        ...
