"""Measure how much a tuned model has forgotten of its base model: `python -m milora_vl.forgetting`.

The measure of the paper (arXiv:2406.09044, after Kalajdzievski 2024) is the cross-entropy of the tuned model against
the predicted distributions of the base model, in nats per token. Its minimum is the entropy of the base model; the
difference is the Kullback-Leibler divergence. It is measured on general text, on text that the base model writes, and
on the answers of the base model about pictures. Each name below is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milora_vl.forgetting.answers import answer_batches, drawn_questions
    from milora_vl.forgetting.measure import Forgetting, measure_forgetting
    from milora_vl.forgetting.text import general_text, sampled_batches, text_blocks

__all__ = [
    "Forgetting",
    "answer_batches",
    "drawn_questions",
    "general_text",
    "measure_forgetting",
    "sampled_batches",
    "text_blocks",
]

_HOME = {
    "Forgetting": "measure",
    "answer_batches": "answers",
    "drawn_questions": "answers",
    "general_text": "text",
    "measure_forgetting": "measure",
    "sampled_batches": "text",
    "text_blocks": "text",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'milora_vl.forgetting' has no attribute {name!r}")
    return getattr(import_module(f"milora_vl.forgetting.{_HOME[name]}"), name)
