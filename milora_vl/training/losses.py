"""The loss of a step: cross-entropy of the supervised tokens, with logits made only where a token is predicted.

Of a LLaVA sequence of 700 positions some 20-60 are supervised; their logits over a vocabulary of 32,000 to 128,000 are
most of a step's memory when they are made everywhere.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100


def takes_columns(model: nn.Module) -> bool:
    """Whether the model's forward can make logits for some columns only (`logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def supervised_columns(labels: Tensor) -> Tensor:
    """Columns whose output predicts a supervised token in some row: (num_columns,), from labels (batch, length).

    >>> supervised_columns(torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]]))
    tensor([0, 1, 2])
    """
    return (labels[:, 1:] != IGNORE).any(dim=0).nonzero().flatten()


def summed_loss(model: nn.Module, inputs: dict[str, Any], *, by_columns: bool) -> tuple[Tensor, int, Any]:
    """Summed cross-entropy in float32, how many tokens it sums over, and the model's outputs.

    `inputs` holds labels (batch, length); they are not passed on, so the model makes no loss of its own. Works through
    any wrapper of the model. A batch with no supervised token gives zero, still attached to the graph.
    """
    labels = inputs["labels"]
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    targets = labels[:, 1:]
    columns = supervised_columns(labels)
    if by_columns:
        # At least one column: an empty one would leave some models without an output to backpropagate from.
        kept = columns if len(columns) else torch.zeros(1, dtype=torch.long, device=labels.device)
        outputs = model(**inputs, logits_to_keep=kept)
        logits, targets = outputs["logits"], targets[:, kept]
    else:
        outputs = model(**inputs)
        logits = outputs["logits"][:, :-1]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten().to(logits.device), ignore_index=IGNORE, reduction="sum"
    )
    return loss, int((labels[:, 1:] != IGNORE).sum()), outputs
