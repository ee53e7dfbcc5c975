"""Run one cell of a study: adapt a new copy of the task's model, train it and measure it."""

from __future__ import annotations

import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_vl import apply_milora
from milora_vl.core.adapter.fixed_a import fix_A
from milora_vl.core.adapter.install import lora_layer
from milora_vl.core.adapter.parameter_groups import parameter_groups
from milora_vl.sweep.cells import Cell, CellNumbers
from studies.rivals import kl_from_base, pieces
from studies.rows import rows_of
from studies.study import Study
from studies.task import Task

_CLIP = 1.0  # HF's max_grad_norm
_OTHER_ORDER = 1000  # added to the seed: the gradient's batches come in another order than the training's
_GRADIENT_BATCHES = 4


def run_cell(task: Task, study: Study, cell: Cell, factors: Path) -> tuple[CellNumbers, dict[str, float]]:
    """Train and measure one cell; return its numbers and the score of each test item.

    `factors` is the folder of the initial factors that all cells share. The cell uses torch's global generator
    (dropout, LoRA's random A) and restores it. A training with a NaN loss is measured too.
    """
    began = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        model = adapted(task, study, cell, task.model(), factors)
        last, step_seconds = train(task, model, study, cell)
    with torch.no_grad():
        measured = task.measure(model.eval())
    numbers = {
        "method": cell.method, "learning_rate": cell.learning_rate, "rank": cell.rank, "seed": cell.seed,
        "validation_loss": measured.validation_loss, "score": measured.score, "forgetting": measured.forgetting,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad), "train_loss": last,
        **measured.more, "step_seconds": step_seconds, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    return numbers, dict(measured.items)


def adapted(task: Task, study: Study, cell: Cell, base: nn.Module, factors: Path) -> Any:
    """Return the model with the adapter of a cell, ready to train."""
    rules = study.rules(cell.method, cell.learning_rate, cell.seed)
    rows = study.rows(cell.method)
    texts = task.calibration() if any(rule.get("protect") for rule in rules) else None
    batches = None
    if rows or any(rule["method"] == "gradient" for rule in rules):
        shuffled = task.batches(study.training(cell.method).batch_size, _OTHER_ORDER + cell.seed)
        batches = list(islice(shuffled, _GRADIENT_BATCHES))
    if rows and batches:
        fixed = rows_of(base, rules, rows, texts, batches)
        model = apply_milora(base, [_as_lora(rule) for rule in rules], cache_dir=factors)
        for path, A in fixed.items():
            fix_A(lora_layer(model, path), "default", A)
    else:
        model = apply_milora(base, rules, cache_dir=factors, calibration=texts, task=batches)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.float()  # half precision loses small Adam steps
    return model


def _as_lora(rule: dict[str, Any]) -> dict[str, Any]:
    return {**rule, "method": "lora", "protect": 0} if "rank" in rule else rule


def train(task: Task, model: Any, study: Study, cell: Cell) -> tuple[float, float]:
    """Train with AdamW, linear warm-up, cosine decay and gradient clipping, like HF's Trainer.

    Return the last loss and the seconds of a step.
    """
    from transformers import get_cosine_schedule_with_warmup

    training, rival = study.training(cell.method), study.rival(cell.method)
    texts = pieces(task.calibration(), rival.texts) if rival else iter(())

    groups = parameter_groups(model, learning_rate=cell.learning_rate, weight_decay=training.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cell.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(training.warmup * training.steps), training.steps)
    batches = task.batches(training.batch_size, cell.seed)
    model.train()
    last = math.nan
    began = time.monotonic()
    for step in range(training.steps):
        batch, term = next(batches), 0.0
        if rival is not None and (step + 1) % rival.every == 0:
            term = rival.every * rival.weight * kl_from_base(task, model, next(texts))
        loss = task.loss(model, batch) + term
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        last = float(loss.detach())
    return last, round((time.monotonic() - began) / training.steps, 3)
