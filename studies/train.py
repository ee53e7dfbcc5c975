"""Run one cell of a study: adapt a new copy of the task's model, train it and measure it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_vl import apply_milora, keep_protected
from milora_vl.adapter.parameter_groups import parameter_groups
from milora_vl.sweep.cells import Cell
from studies.study import Study, Training
from studies.task import Task
from studies.update import Updates

Result = dict[str, Any]
_CLIP = 1.0  # HF's max_grad_norm


def run_cell(task: Task, study: Study, cell: Cell, factors: Path) -> tuple[Result, dict[str, float]]:
    """Train and measure one cell; return its numbers and the score of each test item.

    `factors` is the folder of the initial factors that all cells share. The cell uses torch's global generator
    (dropout, LoRA's random A) and restores it. A training with a NaN loss is measured too.
    """
    began = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        base = task.model()
        updates = Updates.of(base, study.overlap, factors)
        rules = study.rules(cell.method, cell.learning_rate, cell.seed)
        protects = any((rule.get("protect") or {}).get("inputs") is not None for rule in rules)
        model = apply_milora(base, rules, cache_dir=factors, calibration=task.calibration() if protects else None)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.data.float()  # half precision loses small Adam steps
        last = _train(task, model, study.training(cell.method), cell)
    model.eval()
    with torch.no_grad():
        measured = task.measure(model)
        update = updates.measure(model)
    numbers = {
        "method": cell.method, "learning_rate": cell.learning_rate, "rank": cell.rank, "seed": cell.seed,
        "validation_loss": measured.validation_loss, "score": measured.score, "forgetting": measured.forgetting,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad), "train_loss": last,
        **measured.more, **update, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    return numbers, dict(measured.items)


def _train(task: Task, model: Any, training: Training, cell: Cell) -> float:
    """Train with AdamW, linear warm-up, cosine decay and gradient clipping, like HF's Trainer; return the last loss."""
    from transformers import get_cosine_schedule_with_warmup

    groups = parameter_groups(
        model, model.milora_targets, learning_rate=cell.learning_rate, weight_decay=training.weight_decay,
        decays={name for name, p in model.named_parameters() if p.ndim > 1},
    )  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=cell.learning_rate)
    keep_protected(model, optimizer)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(training.warmup * training.steps), training.steps)
    batches = task.batches(training.batch_size, cell.seed)
    model.train()
    last = math.nan
    for _ in range(training.steps):
        loss = task.loss(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        last = float(loss.detach())
    return last
