"""Log-likelihood of a given answer to a prompt, for benchmarks of other suites that rank options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from milora_data.encode.tokens import IGNORE
from milora_vl.models.generate import Prompt, Reader, reader_of


def loglikelihoods(
    model: Any, processor: Any, pairs: Sequence[tuple[Prompt, str]], *, template: str = "vicuna_v1"
) -> list[tuple[float, bool]]:
    """Return per (prompt, answer) the sum of the answer's log-probabilities, and whether greedy decoding produces it.

    The answer follows the prompt directly. Pairs run one at a time, so padding has no effect.
    """
    reader = reader_of(model, processor, template, "pad")
    return [_one(reader, prompt, answer) for prompt, answer in pairs]


@torch.inference_mode()
def _one(reader: Reader, prompt: Prompt, answer: str) -> tuple[float, bool]:
    if not answer:
        return 0.0, True
    inputs = reader.labelled(prompt, answer)
    labels = inputs.pop("labels")[0, 1:]
    is_answer = labels != IGNORE
    logits, targets = reader.model(**inputs).logits[0, :-1][is_answer].float(), labels[is_answer]
    values = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(values.sum()), bool((logits.argmax(-1) == targets).all())
