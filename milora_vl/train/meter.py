"""Measure a run between log lines: tokens per second, padding, supervised tokens, gradient norms per tower."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from milora_data.batches.collate import ImageTextCollator
from milora_data.batches.processor_collate import ProcessorCollator
from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.tokens import IGNORE
from milora_vl.weights.sharding import local_part

FIELDS = ("tokens", "positions", "supervised", "images")


class Meter:
    """Counts tokens and pictures of batches. Each process has one; the trainer sums `totals` over processes."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.counts = torch.zeros(len(FIELDS), dtype=torch.float64)
        self.start = time.perf_counter()

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Count one batch."""
        labels = inputs["labels"]
        mask = inputs.get("attention_mask")
        tokens = labels.numel() if mask is None or mask.dim() != 2 else int(mask.sum())
        seen = (tokens, labels.numel(), int((labels != IGNORE).sum()), self._num_images(inputs))
        self.counts += torch.tensor(seen, dtype=torch.float64)

    def _num_images(self, inputs: Mapping[str, Any]) -> int:
        """Return the number of pictures without the masked dummy picture of a batch that has only text."""
        pixels, mask = inputs.get("pixel_values"), inputs.get("attention_mask")
        if pixels is None:
            return 0
        if isinstance(self.collator, ImageTextCollator) and mask is not None and mask.dim() == 2:
            is_hidden = not ((inputs["input_ids"] == self.collator.image_token_id) & mask.bool()).any()
            return 0 if is_hidden else len(pixels)
        return len(pixels)

    def take(self, totals: Sequence[float]) -> dict[str, float]:
        """Return the log entries for `totals` (FIELDS, summed over processes) and reset the counts."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        self.start = time.perf_counter()
        self.counts.zero_()
        tokens, positions, supervised, images = totals
        entries = {
            "tokens_per_second": round(tokens / seconds, 1),
            "images_per_second": round(images / seconds, 2),
            "padding": round(1 - tokens / max(positions, 1), 4),
            "supervised_tokens": supervised,
        }
        if isinstance(self.collator, ProcessorCollator):
            del entries["images_per_second"]  # the tensors of most families do not show the number of pictures
        if isinstance(self.collator, RecordCollator):
            entries["skipped_records"] = float(sum(self.collator.counts()[name] for name in ("skipped", "unlearnable")))
        return entries


def tower_norms(named: Iterable[tuple[str, nn.Parameter]], tower_of: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the squared gradient norm by tower; `tower_of` maps parameter names. Empty under ZeRO.

    Under FSDP2 each process sums the squares of its own shards.
    """
    squares: dict[str, list[Tensor]] = {}
    for name, parameter in named:
        if parameter.grad is not None and name in tower_of:
            grad = parameter.grad.detach()
            squares.setdefault(tower_of[name], []).append(local_part(grad).float().square().sum())
    return {tower: torch.stack([s.to(sums[0].device) for s in sums]).sum() for tower, sums in squares.items()}


def group_rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the learning rate of each optimizer group by its name. Groups of the same name have one entry."""
    return {f"learning_rate/{group['name']}": float(group["lr"]) for group in groups if "name" in group}
