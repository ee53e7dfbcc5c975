"""Batch size, accumulation, steps per epoch and steps of a run, counted as HF's Trainer counts them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from milora_vl.common.cli.command_line import amount


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """What decides the number of steps. With `max_steps` -1 the epochs decide."""

    num_records: int | None  # of what a batch consists of; None: a stream
    per_device: int
    accumulation: int = 1
    num_devices: int = 1
    epochs: float = 3.0
    max_steps: int = -1
    drop_last: bool = False
    unit: Literal["record", "packed row"] = "record"

    @property
    def total(self) -> int:
        """Return the records, or packed rows, per optimizer step over all devices."""
        return self.per_device * self.accumulation * self.num_devices

    @property
    def steps_per_epoch(self) -> int:
        """Return the optimizer steps of one epoch, or all steps of the run if the data is a stream."""
        if self.num_records is None:
            return self.max_steps
        round_ = math.floor if self.drop_last else math.ceil
        batches = round_(self.num_records / (self.per_device * self.num_devices))
        return max(batches // self.accumulation + (batches % self.accumulation > 0), 1)

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the whole run.

        >>> Batching(num_records=665_298, per_device=16, num_devices=8, epochs=1).steps
        5198
        """
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch)

    def describe(self) -> str:
        """Return the batch as the header shows it."""
        return (
            f"{self.per_device} x {self.accumulation} accumulation x {self.num_devices} "
            f"device{'s' if self.num_devices > 1 else ''} = {self.total}"
        )

    def describe_steps(self) -> str:
        """Return the steps with the number of epochs and records."""
        if self.num_records is None:
            return f"{self.steps:,} ({amount(self.steps * self.total, self.unit)} of a stream)"
        epochs = f"{self.steps / self.steps_per_epoch:.3g}"
        return f"{self.steps:,} ({epochs} epoch{'' if epochs == '1' else 's'} of {amount(self.num_records, self.unit)})"
