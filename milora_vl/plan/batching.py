"""Arithmetic of a run: records per step and number of steps, as HF's Trainer will count them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """What decides the number of steps. `max_steps` of -1 means: by epochs."""

    num_records: int | None  # None: a stream
    per_device: int
    accumulation: int = 1
    num_devices: int = 1
    epochs: float = 3.0
    max_steps: int = -1
    drop_last: bool = False

    @property
    def total(self) -> int:
        """Records per optimizer step, over all devices."""
        return self.per_device * self.accumulation * self.num_devices

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every record once; of a stream, whose end is not known, all steps of the run."""
        if self.num_records is None:
            return self.max_steps
        round_ = math.floor if self.drop_last else math.ceil
        batches = round_(self.num_records / (self.per_device * self.num_devices))
        return max(batches // self.accumulation + (batches % self.accumulation > 0), 1)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run.

        >>> Batching(num_records=665_298, per_device=16, num_devices=8, epochs=1).steps
        5198
        """
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch)

    def describe(self) -> str:
        """As the header says it."""
        return (
            f"{self.per_device} x {self.accumulation} accumulation x {self.num_devices} "
            f"device{'s' if self.num_devices > 1 else ''} = {self.total}"
        )

    def describe_steps(self) -> str:
        """Steps, and how often each record is seen."""
        if self.num_records is None:
            return f"{self.steps:,} ({self.steps * self.total:,} records of a stream)"
        return f"{self.steps:,} ({self.steps / self.steps_per_epoch:.3g} epochs of {self.num_records:,} records)"
