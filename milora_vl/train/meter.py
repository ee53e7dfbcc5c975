"""Measure a run between log lines: tokens per second, padding, supervised tokens, skipped records."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from milora_data.batches.record_collator import RecordCollator
from milora_vl.models.losses import supervised_positions

FIELDS = ("tokens", "positions", "supervised")


class CountingCollator:
    """Adds to the batches of a collator what a step would otherwise read from the GPU, and wait for.

    `counts` are the numbers of FIELDS, `supervised` are the positions for the loss. LLaVA and text models lose an
    attention mask that hides padding on the right alone, because no position of theirs sees a later one: transformers
    would read it from the GPU, and without a mask sdpa has faster kernels.
    """

    def __init__(self, collator: RecordCollator[Any]) -> None:
        self.collator = collator

    def __call__(self, items: Any) -> Any:
        """Return the batch; a loader process that made none returns its error in place of one."""
        batch = self.collator(items)
        if not isinstance(batch, Mapping):
            return batch
        batch, labels = dict(batch), batch["labels"]
        supervised, tokens = supervised_positions(labels), labels.numel()
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            tokens = int(mask.sum())
            if self.collator.is_causal and not (mask[:, 1:] > mask[:, :-1]).any():
                del batch["attention_mask"]
        return {**batch, "supervised": supervised, "counts": (tokens, labels.numel(), supervised.shape[1])}


class Meter:
    """Counts tokens of batches. Each process has one; the trainer sums `counts` over processes."""

    def __init__(self, collator: RecordCollator[Any]) -> None:
        self.collator = collator
        self.counts = [0] * len(FIELDS)
        self.start = time.perf_counter()

    def add(self, counts: Sequence[int]) -> None:
        """Count one batch, by the `counts` of `CountingCollator`."""
        self.counts = [before + more for before, more in zip(self.counts, counts, strict=True)]

    def take(self, totals: Sequence[float]) -> dict[str, float]:
        """Return the log entries for `totals` (FIELDS, summed over processes) and reset the counts."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        self.start = time.perf_counter()
        self.counts = [0] * len(FIELDS)
        tokens, positions, supervised = totals
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "padding": round(1 - tokens / max(positions, 1), 4),
            "supervised_tokens": supervised,
            "skipped_records": float(sum(self.collator.counts()[name] for name in ("skipped", "unlearnable"))),
        }
