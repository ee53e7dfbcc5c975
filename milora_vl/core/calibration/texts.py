"""Texts that a language model writes itself, without any data: they calibrate its protected inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from milora_vl.core.calibration.bases import CalibrationError
from milora_vl.core.calibration.modes import evaluated
from milora_vl.core.policy.towers import is_encoder_decoder
from milora_vl.core.weights.matrices import gathered_in_forward

SEED = 1_651_272_809  # of the calibration texts; no probe of forgetting may measure with it or those after it
RESERVED = 1024
COUNT, LENGTH, ROWS = 56, 192, 8  # one batch of seven checks what the others chose


def calibration_texts(model: Any, *, count: int = COUNT, length: int = LENGTH) -> list[dict[str, Tensor]]:
    """Return calibration batches of texts that the model writes at temperature 1, for `apply_milora`.

    A batch holds `input_ids` and `attention_mask` (8, up to `length`). Equal weights give equal texts on one machine.
    Raises CalibrationError for a model that cannot write text.

    >>> from milora_vl.models.tiny import tiny_llama
    >>> batches = calibration_texts(tiny_llama()[0], count=8, length=6)
    >>> batches[0]["input_ids"].shape[0], batches[0]["attention_mask"].dtype
    (8, torch.int64)
    """
    start, end = text_ends(model)
    with gathered_in_forward(model):
        rows = sampled_rows(model, start, end, count=count, length=length, batch_size=32, seed=SEED)
    return [padded(rows[first : first + ROWS], end) for first in range(0, count, ROWS)]


def text_ends(model: Any) -> tuple[int, int]:
    """Return the ids that start and end a text: BOS, or EOS without a BOS, and EOS.

    Raises CalibrationError for a model that cannot write text, or whose encoder needs an input of its own.
    """
    config: Any = getattr(model, "generation_config", None)
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    if not hasattr(model, "generate") or end is None or is_encoder_decoder(model):
        raise CalibrationError(
            f"a {type(model).__name__} cannot write calibration texts",
            code="calibration-cannot-generate",
            where="calibration",
            hint="pass calibration batches of your own text",
        )
    start = config.bos_token_id
    return (end if start is None else start), end


def sampled_rows(
    model: Any,
    start: int,
    end: int,
    *,
    count: int,
    length: int,
    batch_size: int,
    seed: int,
    on_tokens: Callable[[int], object] = lambda _: None,
) -> list[list[int]]:
    """Return the ids of `count` texts of at most `length` ids, sampled at temperature 1.

    Each text begins with the id `start` and stops after the id `end`. `on_tokens` is called with the
    number of new tokens, `count * (length - 1)` in all: a text that ends early counts as a whole one. The random state
    of the caller does not change.
    """
    written: list[list[int]] = []
    with evaluated(model), torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for begin in range(0, count, batch_size):
            first = torch.full((min(batch_size, count - begin), 1), start, device=model.device)
            counter = _TokenCounter(len(first), length - 1, on_tokens)
            rows = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                generation_config=_sampling(length - 1, end),
                stopping_criteria=[counter],
            )
            on_tokens(counter.left)
            if not bool((rows[:, :1] == first).all()):  # LLaVA's own class returns the new ids alone
                rows = torch.cat([first, rows], dim=1)
            written += [_ended(row, end) for row in rows.tolist()]
    return written


class _TokenCounter:
    """A stopping criterion of `generate` that never stops it: it counts the tokens of `rows` texts."""

    def __init__(self, rows: int, length: int, on_tokens: Callable[[int], object]) -> None:
        self.rows, self.left, self.on_tokens = rows, rows * length, on_tokens

    def __call__(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Count one token of each row."""
        self.left -= self.rows
        self.on_tokens(self.rows)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _sampling(num_tokens: int, end: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=num_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        repetition_penalty=1.0, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip


def _ended(ids: Sequence[int], end: int) -> list[int]:
    """Return the ids up to and including the first generated EOS."""
    generated = list(ids[1:])
    return [ids[0], *(generated[: generated.index(end) + 1] if end in generated else generated)]


def padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Return rows of ids as a batch padded on the right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}
