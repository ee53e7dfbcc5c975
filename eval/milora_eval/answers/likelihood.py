"""Log-likelihood of a given answer to a prompt, for benchmarks of other suites that rank options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from milora_data.encode.tokens import IGNORE
from milora_vl.models.generate import ProcessorReader, Prompt, Reader
from milora_vl.models.image_tokens import uses_processor
from milora_vl.models.loading import split_processor


def loglikelihoods(
    model: Any, processor: Any, pairs: Sequence[tuple[Prompt, str]], *, template: str = "vicuna_v1"
) -> list[tuple[float, bool]]:
    """Return per (prompt, answer) the sum of the answer's log-probabilities, and whether greedy decoding produces it.

    The answer follows the prompt directly. Pairs run one at a time, so padding has no effect.
    """
    if split_processor(processor)[1] is not None and uses_processor(model.config):
        asker = ProcessorReader(model, processor)
        return [_with_processor(asker, prompt, answer) for prompt, answer in pairs]
    reader = Reader(model, processor, template, "pad")
    return [_one(reader, prompt, answer) for prompt, answer in pairs]


@torch.inference_mode()
def _one(reader: Reader, prompt: Prompt, answer: str) -> tuple[float, bool]:
    row = reader.row(prompt)
    after = reader.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not after:
        return 0.0, True
    ids = torch.tensor([[*row.ids, *after]], device=reader.model.device)
    logits = reader.model(input_ids=ids, **reader.pixels([row])).logits[0, -len(after) - 1 : -1].float()
    return _summed(logits, torch.tensor(after, device=logits.device))


@torch.inference_mode()
def _with_processor(asker: ProcessorReader, prompt: Prompt, answer: str) -> tuple[float, bool]:
    if not answer:
        return 0.0, True
    inputs = asker.labelled(prompt, answer)
    labels = inputs.pop("labels")[0, 1:]
    logits = asker.model(**inputs).logits[0, :-1].float()
    return _summed(logits[labels != IGNORE], labels[labels != IGNORE])


def _summed(logits: Tensor, targets: Tensor) -> tuple[float, bool]:
    """Return the sum of the log-probabilities of `targets` (n,) in `logits` (n, vocabulary), and whether all lead."""
    values = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(values.sum()), bool((logits.argmax(-1) == targets).all())
