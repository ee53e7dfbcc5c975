"""Run one cell of a study: adapt a new copy of the task's model, train it and measure it."""

from __future__ import annotations

import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import OSFConfig, get_peft_model
from peft.tuners.osf import OSFLayer
from torch import Tensor, nn

from milora_vl import Policy, apply_milora
from milora_vl.core.adapter.fixed_a import fix_A
from milora_vl.core.adapter.lora import lora_layer
from milora_vl.core.adapter.rates import parameter_groups
from milora_vl.core.calibration.bases import Calibration
from milora_vl.core.policy.policy import with_ranks
from milora_vl.core.weights.matrices import read_matrix
from milora_vl.core.weights.tensor_files import cached_singular_values
from milora_vl.sweep.cells import Cell, CellNumbers
from studies.rivals import loss_with, pieces
from studies.rows import rows_of
from studies.study import Study
from studies.task import Task
from studies.update import Updates

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
        base = task.model()
        updates = Updates.of(base, study.overlap, factors)
        rules = rules_on(base, study, cell, factors)
        model = adapted(task, study, cell, base, rules, factors)
        last, step_seconds = _trained(task, study, cell, model, factors)
    model.eval()
    with torch.no_grad():
        measured = task.measure(model)
        update = updates.measure(model)
    numbers = {
        "method": cell.method, "learning_rate": cell.learning_rate, "rank": cell.rank, "seed": cell.seed,
        "validation_loss": measured.validation_loss, "score": measured.score, "forgetting": measured.forgetting,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad), "train_loss": last,
        **measured.more, **update, "step_seconds": step_seconds, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    return numbers, dict(measured.items)


def rules_on(base: nn.Module, study: Study, cell: Cell, factors: Path) -> list[dict[str, Any]]:
    """Return the rules of a cell; `factors` caches the singular values where they decide the ranks."""
    rules, ranks = study.rules(cell.method, cell.learning_rate, cell.seed), study.ranks(cell.method)
    if ranks is None:
        return rules
    policy = Policy.parse(rules)

    def spectrum(path: str) -> Tensor:
        return cached_singular_values(read_matrix(base.get_submodule(path)), factors)

    return with_ranks(policy, base, ranks, spectrum).to_list()


def adapted(task: Task, study: Study, cell: Cell, base: nn.Module, rules: list[dict[str, Any]], factors: Path) -> Any:
    """Return the model with the adapter of a cell, ready to train."""
    if study.arms[cell.method].get("osf"):
        return _osf(base, rules)
    rows = study.rows(cell.method)
    texts = _texts(task, study, cell) if any(rule.get("protect") for rule in rules) else None
    batches = None
    if rows or any(rule.get("method") == "gradient" for rule in rules):
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
    return {**rule, "method": "lora", "protect": 0} if rule["method"] == "gradient" else rule


def _texts(task: Any, study: Study, cell: Cell) -> Calibration:
    """Return the calibration of an arm; a task with pictures describes as many as the arm says."""
    arm = study.arms[cell.method]
    texts: Calibration = task.calibration(*([arm["pictures"]] if "pictures" in arm else []))
    return texts


def _osf(base: nn.Module, rules: list[dict[str, Any]]) -> Any:
    """Adapt the layers of the rules by PEFT's OSF: the minor half of each trains off the principal one."""
    paths = [target.path for target in Policy.parse(rules).resolve(base) if target.rank is not None]
    dtype = next(base.parameters()).dtype
    model: Any = get_peft_model(base.float(), OSFConfig(target_modules=paths))  # hooks multiply factors and gradients
    for parameter in (p for p in model.parameters() if not p.requires_grad):
        parameter.data = parameter.data.to(dtype)
    for layer in (module for module in model.modules() if isinstance(module, OSFLayer)):
        layer.cast_input_dtype_enabled = True  # type: ignore[attr-defined]  # PEFT reads it, and OSF does not set it
    model.milora_targets = []  # no rule has a rate of its own, and no layer is a LoRA whose update is measured
    return model


def _trained(task: Task, study: Study, cell: Cell, model: Any, factors: Path) -> tuple[float, float]:
    """Train the model; return the last loss and the seconds of a step.

    Arms that scale the finished adapter share one training.
    """
    scale = study.arms[cell.method].get("scale")
    if scale is None:
        return train(task, model, study, cell)
    file = factors / "trained" / f"{study.key(cell, of_training=True)}.pt"
    if not file.is_file():
        numbers = train(task, model, study, cell)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save((numbers, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}), file)
    numbers, state = torch.load(file)
    model.load_state_dict(state, strict=False)
    for target in model.milora_targets:
        if target.rank is not None:
            lora_layer(model, target.path).scale_layer(scale)
    return numbers


def train(task: Task, model: Any, study: Study, cell: Cell) -> tuple[float, float]:
    """Train with AdamW, linear warm-up, cosine decay and gradient clipping, like HF's Trainer.

    Return the last loss and the seconds of a step.
    """
    from transformers import get_cosine_schedule_with_warmup

    training, rival = study.training(cell.method), study.rival(cell.method)
    texts = pieces(_texts(task, study, cell), rival.texts) if rival else iter(())

    def loss_of(batch: Any, step: int) -> Tensor:
        return task.loss(model, batch) if rival is None else loss_with(rival, task, model, batch, texts, step)

    groups = parameter_groups(model, learning_rate=cell.learning_rate, weight_decay=training.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cell.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(training.warmup * training.steps), training.steps)
    batches = task.batches(training.batch_size, cell.seed)
    model.train()
    last = math.nan
    began = time.monotonic()
    for step in range(training.steps):
        loss = loss_of(next(batches), step)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        last = float(loss.detach())
    return last, round((time.monotonic() - began) / training.steps, 3)
