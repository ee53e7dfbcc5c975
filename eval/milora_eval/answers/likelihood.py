"""How likely a model finds a given answer to a prompt: for benchmarks of other suites that rank options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from milora_vl.generate import Prompt, Reader


def loglikelihoods(
    model: Any, processor: Any, pairs: Sequence[tuple[Prompt, str]], *, template: str = "vicuna_v1"
) -> list[tuple[float, bool]]:
    """Return for each (prompt, answer) the sum of the answer's log-probabilities, and whether greedy decoding says it.

    The answer begins where the prompt ends; one pair at a time, so that padding plays no part.
    """
    reader = Reader(model, processor, template, "pad")
    return [_one(reader, prompt, answer) for prompt, answer in pairs]


@torch.inference_mode()
def _one(reader: Reader, prompt: Prompt, answer: str) -> tuple[float, bool]:
    row = reader.whole(reader.row(0, prompt))
    after = reader.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not after:
        return 0.0, True
    ids = torch.tensor([[*row.ids, *after]], device=reader.model.device)
    logits = reader.model(input_ids=ids, **reader.pixels([row])).logits[0, -len(after) - 1 : -1].float()
    targets = torch.tensor(after, device=logits.device)
    values = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(values.sum()), bool((logits.argmax(-1) == targets).all())
