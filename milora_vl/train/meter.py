"""Measure a run between log lines: tokens per second, padding, supervised tokens, skipped records."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.tokens import IGNORE

FIELDS = ("tokens", "positions", "supervised")


class Meter:
    """Counts tokens of batches. Each process has one; the trainer sums `counts` over processes."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.counts = torch.zeros(len(FIELDS), dtype=torch.float64)
        self.start = time.perf_counter()

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Count one batch."""
        labels = inputs["labels"]
        mask = inputs.get("attention_mask")
        tokens = labels.numel() if mask is None or mask.dim() != 2 else int(mask.sum())
        seen = (tokens, labels.numel(), int((labels != IGNORE).sum()))
        self.counts += torch.tensor(seen, dtype=torch.float64)

    def take(self, totals: Sequence[float]) -> dict[str, float]:
        """Return the log entries for `totals` (FIELDS, summed over processes) and reset the counts."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        self.start = time.perf_counter()
        self.counts.zero_()
        tokens, positions, supervised = totals
        entries = {
            "tokens_per_second": round(tokens / seconds, 1),
            "padding": round(1 - tokens / max(positions, 1), 4),
            "supervised_tokens": supervised,
        }
        if isinstance(self.collator, RecordCollator):
            entries["skipped_records"] = float(sum(self.collator.counts()[name] for name in ("skipped", "unlearnable")))
        return entries
