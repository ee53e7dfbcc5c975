"""Run one cell of a study: adapt a new copy of the task's model, train it and measure it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from milora_vl import apply_milora, keep_protected
from milora_vl.adapter.parameter_groups import parameter_groups
from milora_vl.policy import Policy
from milora_vl.sweep.cells import Cell
from studies.starts import Factors, replace_anchors, starting_factors
from studies.study import Start, Study, Training
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
        start = study.start(cell.method)
        anchors = None if start is None else _anchors(cast(Any, task), start, _without_rates(rules))
        model = apply_milora(base, rules, cache_dir=factors, calibration=task.calibration() if protects else None)
        if anchors is not None:
            replace_anchors(model, anchors)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = parameter.data.float()  # half precision loses small Adam steps
        last = _train(task, model, study.training(cell.method, cell.steps), cell)
    model.eval()
    with torch.no_grad():
        measured = task.measure(model)
        update = updates.measure(model)
    numbers = {
        "method": cell.method, "learning_rate": cell.learning_rate, "rank": cell.rank, "seed": cell.seed,
        **({} if cell.steps is None else {"steps": cell.steps}),
        "validation_loss": measured.validation_loss, "score": measured.score, "forgetting": measured.forgetting,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad), "train_loss": last,
        **measured.more, **update, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    return numbers, dict(measured.items)


def _without_rates(rules: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps([{name: value for name, value in rule.items() if name != "learning_rate"} for rule in rules])


@lru_cache(maxsize=2)
def _anchors(task: Any, start: Start, rules: str) -> Factors:
    """Return the factors of a start that needs activations; all cells of an arm share them within a process."""
    base = task.model()
    return starting_factors(start, base, Policy.parse_and_resolve(json.loads(rules), base), task.calibration())


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
