"""Task after task on one base: a cell trains the tasks of a study in order, and tests all of them so far after each.

The update of a finished task is added to the base in float32, which is what a frozen adapter computes. Forgetting is
the KL from the original base. The scores follow the benchmarks of continual instruction tuning, CoIN
(arXiv:2403.08350) and UCIT (arXiv:2503.12941).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain as chain_of
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from milora_data.keys import FileKeys, record_key
from milora_data.records.record import Record
from milora_vl import merge
from milora_vl.common.atomic_write import atomic_file
from milora_vl.core.calibration.bases import Batches, Calibration, sources_of
from milora_vl.sweep.cells import Cell, CellNumbers
from studies.study import Study
from studies.task import Task
from studies.tasks import load_task
from studies.tasks.answers import AnswerTask
from studies.train import adapted, train

Scores = Sequence[Sequence[float]]
"""Row j holds the scores of the tasks 1 to j after the training of task j: A[j][i] of the papers."""


def average(scores: Scores) -> float:
    """Return the average accuracy: the mean over trainings of the mean score of the tasks so far (MAA).

    >>> average([[0.5], [0.25, 0.75]])
    0.5
    """
    return fmean(fmean(row) for row in scores)


def backward_transfer(scores: Scores) -> float:
    """Return the mean change of the score of each task but the last, from its own training to the end (BWT).

    >>> backward_transfer([[0.5], [0.25, 0.75]])
    -0.25
    """
    return fmean(end - row[-1] for row, end in zip(scores[:-1], scores[-1][:-1], strict=True))


def run_chain(task: Task, study: Study, cell: Cell, factors: Path) -> tuple[CellNumbers, dict[str, float]]:
    """Train and measure one chain; return its numbers and the score of each test item at the end.

    `score` is the last accuracy, `score_j_i` that of task i after task j. The trained adapters are kept in `factors`:
    arms that begin alike share them, and a chain that was ended continues.
    """
    began = time.monotonic()
    others = [load_task(name) for name in study.then]
    tasks = [one for one in (task, *others) if isinstance(one, AnswerTask)]
    assert len(tasks) == 1 + len(others), "only tasks with questions and answers follow each other"
    numbers: dict[str, Any] = {"method": cell.method, "learning_rate": cell.learning_rate, "seed": cell.seed}
    scores, items = [], {}
    with torch.random.fork_rng(devices=[]):
        for stage in _stages(tasks, study, cell, factors):
            model = stage.model.eval()
            with torch.no_grad():
                measured = tasks[stage.number - 1].measure(model)
                tests = [one.tested(model)[1] for one in tasks[: stage.number - 1]] + [measured.items]
            scores.append([fmean(test.values()) for test in tests])
            numbers |= {f"score_{stage.number}_{i}": score for i, score in enumerate(scores[-1], start=1)}
            numbers |= {f"forgetting_{stage.number}": measured.forgetting, **stage.numbers}
            items = {f"{i} {name}": hit for i, test in enumerate(tests, start=1) for name, hit in test.items()}
    numbers |= {"validation_loss": measured.validation_loss, "score": fmean(scores[-1])}
    numbers |= {"forgetting": measured.forgetting, "trainable": stage.trainable}
    if len(scores) > 1:
        numbers |= {"average": average(scores), "backward": backward_transfer(scores)}
    return numbers | {"seconds": round(time.monotonic() - began, 1)}, items


@dataclass(frozen=True, slots=True)
class _Stage:
    """A model after the task with this number, from 1; `numbers` are further columns of the CSV file."""

    number: int
    model: nn.Module
    trainable: int
    numbers: Mapping[str, float]


def _stages(tasks: Sequence[AnswerTask], study: Study, cell: Cell, factors: Path) -> Iterator[_Stage]:
    chain, texts = study.chain(cell.method), tasks[0].calibration()
    base: Any = tasks[0].model().float()
    if chain.start == "joint":
        records = [record for task in tasks for record in task.train]
        one = study.model_copy(update={"steps": study.steps * len(tasks)})
        model, _ = _trained(tasks[0].changed(records, texts), one, cell, base, factors, "")
        yield _Stage(len(tasks), model, _count(model), {})
        return
    model, done = base, ""
    for number, task in enumerate(tasks, start=1):
        earlier = tasks[: number - 1]
        replayed = [r for e in earlier for r in _drawn(e, round(chain.replay * len(e.train)), cell.seed)]
        now = task.changed([*task.train, *replayed], _calibration(earlier, texts, study, cell))
        model, done = _trained(now, study, cell, model, factors, done)
        yield _Stage(number, model, _count(model), _room(model, number))
        model = merge(model) if chain.start == "new" else model


def _trained(task: AnswerTask, study: Study, cell: Cell, model: Any, factors: Path, before: str) -> tuple[Any, str]:
    """Train an adapter on a model, a new one unless it has one; return the model and a hash of all trainings so far."""
    torch.manual_seed(cell.seed)
    if not isinstance(model, PeftModel):
        model = adapted(task, study, cell, model, factors)
    single = study.model_copy(update={"then": []})
    key_of = FileKeys()
    records = [record_key(record, key_of) for record in task.train]
    content = [before, single.key(cell), records, _digest(task.calibration())]
    done = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]
    file = factors / "trained" / f"{done}.pt"
    if not file.is_file():
        train(task, model, study, cell)
        with atomic_file(file) as partial:  # other cells read it
            torch.save({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, partial)
    model.load_state_dict(torch.load(file), strict=False)
    return model, done


def _calibration(earlier: Sequence[AnswerTask], texts: Calibration, study: Study, cell: Cell) -> Mapping[str, Batches]:
    """Return the sources of the calibration: the texts of the base, and records of each earlier task."""
    chain = study.chain(cell.method)
    sources = {"base": list(chain_of(*sources_of(texts)))}
    for number, task in enumerate(earlier if chain.earlier else (), start=1):
        sources[str(number)] = task.inputs(_drawn(task, min(chain.earlier, len(task.train)), cell.seed))
    return sources


def _drawn(task: AnswerTask, count: int, seed: int) -> list[Record]:
    order: list[int] = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
    return [task.train[index] for index in order[:count]]


def _digest(calibration: Calibration) -> str:
    digest = hashlib.sha256()
    for batches in sources_of(calibration):
        digest.update(f"{len(batches)}".encode())
        for batch in batches:
            digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _room(model: Any, number: int) -> dict[str, float]:
    """Return what the layers protect: the mean share of the input energy, the lowest, and the share of directions."""
    of_layers = list(model.milora_protection.values())
    if not of_layers:
        return {}
    energies = [one.energy for one in of_layers]
    directions = fmean(one.directions / one.inputs for one in of_layers)
    return {f"energy_{number}": fmean(energies), f"lowest_{number}": min(energies), f"protected_{number}": directions}
