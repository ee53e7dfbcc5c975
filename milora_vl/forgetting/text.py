"""The text probes of forgetting: three books of the package, or samples of the base model, with their seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from milora_data.encode.tokens import bos_ids

CALIBRATION_SEED = 1_651_272_809  # of the texts that protected inputs are found on, which no probe may measure with


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of both models: forward arguments with `input_ids` (rows, length).

    `counted` (rows, length - 1) marks the predictions that count: position t predicts id t + 1. `documents` names the
    document of each row: predictions in one document are not independent of each other.
    """

    inputs: Mapping[str, Tensor]
    counted: Tensor
    documents: Sequence[str]


def general_text() -> dict[str, str]:
    """Return the texts of the package by name: parts of three public-domain books (general_text/)."""
    folder = files("milora_vl") / "general_text"
    names = ("alice_in_wonderland", "news_from_nowhere", "origin_of_species")
    return {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in names}


def text_blocks(
    texts: Mapping[str, str], tokenizer: Any, *, num_tokens: int, block_length: int
) -> list[tuple[str, list[int]]]:
    """Return blocks (name of the text, ids), taken from the texts in turn. BOS comes first if the tokenizer adds it.

    A text shorter than a block is one block. The incomplete last block of a longer text is dropped. Raises ValueError
    if the texts contain no tokens to predict.
    """
    first = bos_ids(tokenizer)
    step = block_length - len(first)
    cut: list[Iterator[tuple[str, list[int]]]] = []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ends = range(step, len(ids) + 1, step) if len(ids) > step else [len(ids)]
        cut.append(iter([(name, first + ids[max(0, end - step) : end]) for end in ends]))
    blocks: list[tuple[str, list[int]]] = []
    remaining = num_tokens
    while cut and remaining > 0:
        source = cut.pop(0)
        block = next(source, None)
        if block is not None:
            remaining -= len(block[1])
            blocks += [block] if len(block[1]) > 1 else []  # a single id has no prediction
            cut.append(source)
    if not blocks:
        raise ValueError("the texts are empty")
    return blocks


def text_batches(
    texts: Mapping[str, str], tokenizer: Any, *, num_tokens: int, block_length: int, batch_size: int
) -> Iterator[Batch]:
    """Yield the blocks of the texts (see `text_blocks`) in batches."""
    yield from padded_batches(
        text_blocks(texts, tokenizer, num_tokens=num_tokens, block_length=block_length), batch_size, tokenizer
    )


def sampled_batches(
    model: Any,
    tokenizer: Any,
    *,
    without_adapter: bool = False,
    num_tokens: int = 8192,
    length: int = 128,
    batch_size: int = 16,
    seed: int = 0,
) -> Iterator[Batch]:
    """Yield text sampled from `model` at temperature 1, without any data.

    Each sample is a document that starts with BOS (or EOS without a BOS token) and ends with EOS or after `length` ids.
    All ids but the first count. `without_adapter` samples from the base model of a PeftModel. The random state of the
    caller does not change. Raises ValueError for the seed of the calibration texts, which would be measured again.
    """
    if seed & 0xFFFFFFFF == CALIBRATION_SEED:  # torch's generator of the CPU uses 32 bits
        raise ValueError(f"seed {seed} gives the calibration texts of protected inputs; use another seed")
    count = max(2, -(-num_tokens // (length - 1)))  # a single document has no standard error
    context: AbstractContextManager[None] = model.disable_adapter() if without_adapter else nullcontext()
    with context:
        rows = sampled_rows(model, tokenizer, count=count, length=length, batch_size=batch_size, seed=seed)
    written = [(f"sample {i}", row) for i, row in enumerate(rows)]
    yield from padded_batches(sorted(written, key=lambda pair: len(pair[1])), batch_size, tokenizer)


def sampled_rows(
    model: Any,
    tokenizer: Any,
    *,
    count: int,
    length: int,
    batch_size: int,
    seed: int,
    on_batch: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Return the ids of `count` documents of at most `length` ids, sampled as in `sampled_batches`.

    `on_batch` is called with the number of new documents after each batch.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ends = tokenizer.eos_token_id
    written: list[list[int]] = []
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            for begin in range(0, count, batch_size):
                first = torch.full((min(batch_size, count - begin), 1), start, device=model.device)
                rows = model.generate(
                    input_ids=first,
                    attention_mask=torch.ones_like(first),
                    generation_config=_sampling(length - 1, ends),
                )
                written += [_ended(row, ends) for row in rows.tolist()]
                if on_batch is not None:
                    on_batch(len(first))
    finally:
        model.train(training)
    return written


def _sampling(num_tokens: int, ends: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=num_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        repetition_penalty=1.0, eos_token_id=ends, pad_token_id=ends,
    )  # fmt: skip


def _ended(ids: Sequence[int], end: int) -> list[int]:
    """Return the ids up to and including the first generated EOS."""
    generated = list(ids[1:])
    return [ids[0], *(generated[: generated.index(end) + 1] if end in generated else generated)]


def padded_batches(rows: Sequence[tuple[str, list[int]]], batch_size: int, tokenizer: Any) -> Iterator[Batch]:
    """Yield rows of ids, each with the name of its document, in batches padded on the right."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(len(ids) for _, ids in part)
        ids = torch.full((len(part), width), tokenizer.eos_token_id or 0)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for i, (_, row) in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        yield Batch({"input_ids": ids, "attention_mask": mask}, mask[:, 1:].bool(), [name for name, _ in part])
