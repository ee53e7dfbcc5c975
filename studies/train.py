"""Run one cell of a study: adapt a new copy of the task's model, train it and measure it."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from milora_vl import apply_milora
from milora_vl.core.adapter.rates import parameter_groups
from milora_vl.sweep.cells import Cell, CellNumbers
from studies.rivals import kl_from_base, kl_off_target, pieces
from studies.study import Study, protects
from studies.task import Task

_CLIP = 1.0  # HF's max_grad_norm
_LAST = 10  # steps whose mean is a training loss


def run_cell(task: Task, study: Study, cell: Cell, factors: Path) -> tuple[CellNumbers, dict[str, float]]:
    """Train and measure one cell; return its numbers and the score of each test item.

    `factors` is the folder of the initial factors that all cells share. The cell uses torch's global generator
    (dropout, LoRA's random A) and restores it. A training with a NaN loss is measured too.
    """
    began = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        model = adapted(task, study, cell, task.model(), factors)
        losses, step_seconds = train(task, model, study, cell)
    with torch.no_grad():
        measured = task.measure(model.eval())
    numbers = {
        "method": cell.method, "learning_rate": cell.learning_rate, "rank": cell.rank, "seed": cell.seed,
        "validation_loss": measured.validation_loss, "score": measured.score, "forgetting": measured.forgetting,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad), **losses,
        **measured.more, "step_seconds": step_seconds, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    return numbers, dict(measured.items)


def adapted(task: Task, study: Study, cell: Cell, base: nn.Module, factors: Path) -> Any:
    """Return the model with the adapter of a cell, ready to train."""
    rules = study.rules(cell.method, cell.learning_rate, cell.seed)
    model = apply_milora(base, rules, cache_dir=factors, calibration=task.calibration() if protects(rules) else None)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.float()  # half precision loses small Adam steps
    return model


def train(task: Task, model: Any, study: Study, cell: Cell) -> tuple[dict[str, float], float]:
    """Train with AdamW, linear warm-up, cosine decay and gradient clipping, like HF's Trainer.

    Return the mean training loss of the last steps and the losses at the steps of the study, and the seconds of a step.
    """
    from transformers import get_cosine_schedule_with_warmup

    training, rival = study.training(cell.method), study.rival(cell.method)
    texts = pieces(task.calibration(), rival.texts) if rival and rival.kind == "own" else iter(())

    groups = parameter_groups(model, learning_rate=cell.learning_rate, weight_decay=training.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cell.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(training.warmup * training.steps), training.steps)
    batches = task.batches(training.batch_size, cell.seed)
    model.train()
    losses: list[float] = []
    at_steps: dict[str, float] = {}
    seconds, began = 0.0, time.monotonic()
    for step in range(training.steps):
        batch = next(batches)
        loss = task.loss(model, batch)
        losses.append(float(loss.detach()))
        if rival is not None and (step + 1) % rival.every == 0:
            off_target = rival.kind == "off-target"
            term = kl_off_target(task, model, batch) if off_target else kl_from_base(task, model, next(texts))
            loss = loss + rival.every * rival.weight * term
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 in study.losses_at:
            seconds += time.monotonic() - began
            with torch.no_grad():
                held_out = {"train_loss": fmean(losses[-_LAST:]), **task.losses(model.eval())}
            at_steps |= {f"{name}_{step + 1}": value for name, value in held_out.items()}
            model.train()
            began = time.monotonic()
    seconds += time.monotonic() - began
    return {"train_loss": fmean(losses[-_LAST:]), **at_steps}, round(seconds / training.steps, 3)
