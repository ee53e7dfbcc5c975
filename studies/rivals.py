"""Terms that keep an arm near its base: KL from the base on texts that it wrote, or on the task without its targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor

from milora_data.encode.labels import IGNORE
from milora_vl.core.calibration.bases import Calibration, kinds_of
from milora_vl.core.policy.towers import image_token_of

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


def kl_from_base(task: Any, model: Any, text: Batch) -> Tensor:
    """Return the mean KL from the base to the model over the tokens of a batch, without pictures and padding."""
    ids, picture = text["input_ids"][:, 1:], image_token_of(model)
    is_real = text["attention_mask"][:, 1:].bool() & (ids != (-1 if picture is None else picture))
    after = task.logits(model, text)[:, :-1][is_real].float().log_softmax(-1)
    with torch.no_grad(), model.disable_adapter():
        before = task.logits(model, text)[:, :-1][is_real].float().log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).mean()


def kl_off_target(task: Any, model: Any, batch: Batch) -> Tensor:
    """Return the mean KL from the base over the answer tokens, each without the token that is right.

    The others' probabilities are normalised anew (Mask the Target, arXiv:2605.29498).
    """
    after = _off_target(*task.at_answers(model, batch))
    with torch.no_grad(), model.disable_adapter():
        before = _off_target(*task.at_answers(model, batch))
    return (before.exp() * (before - after)).sum(-1).mean()


def _off_target(logits: Tensor, labels: Tensor) -> Tensor:
    is_answer = labels != IGNORE
    right = labels[is_answer].unsqueeze(1)
    return logits[is_answer].float().scatter(1, right, -1e9).log_softmax(-1)  # not -inf: 0 times it is NaN
