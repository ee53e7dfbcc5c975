"""Texts that a language model writes itself, without any data: they calibrate its protected inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from milora_vl.core.calibration.bases import CalibrationError
from milora_vl.core.evaluation_mode import evaluated
from milora_vl.core.policy.towers import is_encoder_decoder
from milora_vl.core.weights.distributed import gathered

SEED = 1_651_272_809  # of the calibration texts, and those after it
COUNT, LENGTH, ROWS = 56, 192, 8  # one batch of seven checks what the others chose
HELD_OUT_TEXTS = ROWS  # more than a recipe asks for; after 48 texts they are the batch that checks the shares
CACHE_BYTES = 2 * 1024**3  # of keys and values while the model writes


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
    with gathered(model):
        at_once = rows_at_once(model, length)
        rows = sampled_rows(model, start, end, count=count, length=length, batch_size=at_once, seed=SEED)
    return [padded(rows[first : first + ROWS], end) for first in range(0, count, ROWS)]


def text_ends(model: Any) -> tuple[int, int]:
    """Return the ids that start and end a text: BOS, or EOS without a BOS, and EOS.

    Raises CalibrationError for a model that cannot write text, or whose encoder needs another input.
    """
    config: Any = getattr(model, "generation_config", None)
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    if not hasattr(model, "generate") or end is None or is_encoder_decoder(model):
        message = f"a {type(model).__name__} cannot write calibration texts"
        hint = "pass calibration batches of your own text"
        raise CalibrationError(message, where="calibration", hint=hint)
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

    Each text begins with the id `start` and stops after the id `end`. `on_tokens` is called with the number of new
    tokens, `count * (length - 1)` in all: a text that ends early counts as a whole one.
    """
    written: list[list[int]] = []
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same draws on any device
    config = GenerationConfig(
        max_new_tokens=length - 1, do_sample=False, num_beams=1, temperature=1.0, top_k=50, top_p=1.0,
        repetition_penalty=1.0, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    with evaluated(model), torch.no_grad():
        for begin in range(0, count, batch_size):
            first = torch.full((min(batch_size, count - begin), 1), start, device=model.device)
            draw = _Draw(generator, len(first) * (length - 1), on_tokens)
            rows = model.generate(
                first,
                attention_mask=torch.ones_like(first),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
            )
            on_tokens(draw.left)
            if not bool((rows[:, :1] == first).all()):  # LLaVA's own class returns the new ids alone
                rows = torch.cat([first, rows], dim=1)
            written += [_ended(row, end) for row in rows.tolist()]
    return written


def rows_at_once(model: Any, length: int) -> int:
    """Return how many texts of `length` ids a model writes together: their keys and values fill at most CACHE_BYTES.

    On a CPU, 56 texts at once take three fifths of their time in batches of 16 (SmolLM2).
    """
    config = model.config.get_text_config(decoder=True)
    row = 2 * config.num_hidden_layers * config.hidden_size * length * model.dtype.itemsize
    return int(max(1, CACHE_BYTES // row))


class _Draw(LogitsProcessor):
    """Let greedy decoding draw from the softmax: the drawn id keeps the only finite score. It counts the tokens.

    transformers' sampling draws a random number for each id of the vocabulary: a sixth of the time of a small model.
    """

    def __init__(self, generator: torch.Generator, left: int, on_tokens: Callable[[int], object]) -> None:
        self.generator, self.left, self.on_tokens = generator, left, on_tokens

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (rows, vocabulary) of one drawn id each."""
        self.left -= len(ids)
        self.on_tokens(len(ids))
        shares = scores.float().softmax(dim=-1).cumsum(dim=-1)
        draws = torch.rand(len(ids), 1, generator=self.generator).to(scores.device) * shares[:, -1:]
        drawn = torch.searchsorted(shares, draws, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _ended(ids: Sequence[int], end: int) -> list[int]:
    generated = list(ids[1:])
    return [ids[0], *(generated[: generated.index(end) + 1] if end in generated else generated)]


def padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}
