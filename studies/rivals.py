"""Ways to keep what the base knows that need no protected inputs: terms that are added to the loss of the training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from milora_vl.core.calibration.bases import Calibration, kinds_of
from milora_vl.core.policy.towers import image_token_of
from studies.study import Rival

Batch = Mapping[str, Tensor]


def pieces(calibration: Calibration, rows: int) -> Iterator[Batch]:
    """Yield `rows` rows of the batches at a time, in an endless stream. Sources, texts and pictures take turns."""
    return _in_turn(_in_turn(_cut(kind, rows) for kind in kinds) for kinds in kinds_of(calibration))


def _cut(batches: Sequence[Batch], rows: int) -> Iterator[Batch]:
    """Yield `rows` rows of the batches at a time, in an endless stream."""
    return cycle(
        [
            {name: value[start : start + rows] for name, value in batch.items()}
            for batch in batches
            for start in range(0, len(batch["attention_mask"]), rows)
        ]
    )


def _in_turn(streams: Iterable[Iterator[Batch]]) -> Iterator[Batch]:
    return chain.from_iterable(zip(*streams, strict=True))


def loss_with(rival: Rival, task: Any, model: Any, batch: Any, texts: Iterator[Batch], step: int) -> Tensor:
    """Return the loss of a batch of the task with the term of the rival, if step `step`, from 0, has it."""
    if (step + 1) % rival.every:
        loss: Tensor = task.loss(model, batch)
        return loss
    weight = rival.every * rival.weight
    if rival.kind == "rest":
        logits, labels = task.answer_logits(model, batch)
        with torch.no_grad(), model.disable_adapter():
            before, _ = task.answer_logits(model, batch)
        others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], value=False)
        term = _kl(*(part[others].view(len(labels), -1) for part in (before, logits)))
        return cross_entropy(logits, labels) + weight * term
    text = next(texts)
    ids, picture = text["input_ids"][:, 1:], image_token_of(model)
    is_real = text["attention_mask"][:, 1:].bool() & (ids != (-1 if picture is None else picture))
    logits = task.logits(model, text)[:, :-1][is_real].float()
    if rival.kind == "mix":
        term = cross_entropy(logits, ids[is_real])
    else:
        with torch.no_grad(), model.disable_adapter():
            before = task.logits(model, text)[:, :-1][is_real].float()
        term = _kl(before, logits)
    loss = task.loss(model, batch)
    return loss + weight * term


def _kl(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean over rows of KL(softmax(before) || softmax(after)), both (n, vocabulary)."""
    first, second = before.log_softmax(-1), after.log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1).mean()
