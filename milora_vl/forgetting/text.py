"""What forgetting is measured on in text: the package's three books, or what the base model itself writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from milora_data.tokens import bos_ids


@dataclass(frozen=True, slots=True)
class Batch:
    """What both models read: forward arguments with `input_ids` (rows, length).

    `counted` (rows, length - 1) says which predictions count: position t is the prediction of id t + 1. `documents`
    names, row by row, where the text is from: predictions from one document are not independent of each other.
    """

    inputs: Mapping[str, Tensor]
    counted: Tensor
    documents: Sequence[str]


def general_text() -> dict[str, str]:
    """Return the package's own texts by name: parts of three public-domain books (general_text/)."""
    folder = files("milora_vl") / "general_text"
    names = ("alice_in_wonderland", "news_from_nowhere", "origin_of_species")
    return {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in names}


def text_blocks(
    texts: Mapping[str, str], tokenizer: Any, *, num_tokens: int, block_length: int
) -> list[tuple[str, list[int]]]:
    """Return blocks (name of the text, ids) cut from the texts in turn; BOS first where the tokenizer adds one.

    A text that does not fill a block is one by itself; of longer ones the end that fills none is left out. Raises
    ValueError when the texts hold nothing that could be predicted.
    """
    first = bos_ids(tokenizer)
    step = block_length - len(first)
    cut: list[Iterator[tuple[str, list[int]]]] = []
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ends = range(step, len(ids) + 1, step) if len(ids) > step else [len(ids)]
        cut.append(iter([(name, first + ids[max(0, end - step) : end]) for end in ends]))
    blocks: list[tuple[str, list[int]]] = []
    wanted = num_tokens
    while cut and wanted > 0:
        source = cut.pop(0)
        block = next(source, None)
        if block is not None:
            wanted -= len(block[1])
            blocks += [block] if len(block[1]) > 1 else []  # one id predicts nothing
            cut.append(source)
    if not blocks:
        raise ValueError("the texts are empty")
    return blocks


def text_batches(
    texts: Mapping[str, str], tokenizer: Any, *, num_tokens: int, block_length: int, batch_size: int
) -> Iterator[Batch]:
    """Yield the blocks of the texts (see `text_blocks`) in batches."""
    yield from _batches(
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
    """Yield text that `model` writes itself: sampled at temperature 1 from its own distribution, no data needed.

    Each sample is a document, begun by BOS (or EOS, in a model without one), ended by EOS or after `length` ids; all
    its ids but the first count. `without_adapter` lets the base of a PeftModel write. The random state of the
    caller is left alone.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ends = tokenizer.eos_token_id
    count = max(2, -(-num_tokens // (length - 1)))  # of one alone there would be no standard error
    written: list[tuple[str, list[int]]] = []
    context: AbstractContextManager[None] = model.disable_adapter() if without_adapter else nullcontext()
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(), torch.inference_mode(), context:
            torch.manual_seed(seed)
            for begin in range(0, count, batch_size):
                first = torch.full((min(batch_size, count - begin), 1), start, device=model.device)
                rows = model.generate(
                    input_ids=first,
                    attention_mask=torch.ones_like(first),
                    generation_config=_sampling(length - 1, ends),
                )
                written += [(f"sample {begin + i}", _ended(row, ends)) for i, row in enumerate(rows.tolist())]
    finally:
        model.train(training)
    yield from _batches(sorted(written, key=lambda pair: len(pair[1])), batch_size, tokenizer)


def _sampling(num_tokens: int, ends: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=num_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        repetition_penalty=1.0, eos_token_id=ends, pad_token_id=ends,
    )  # fmt: skip


def _ended(ids: Sequence[int], end: int) -> list[int]:
    """The ids up to the first EOS that the model wrote, that one included."""
    wrote = list(ids[1:])
    return [ids[0], *(wrote[: wrote.index(end) + 1] if end in wrote else wrote)]


def _batches(rows: Sequence[tuple[str, list[int]]], batch_size: int, tokenizer: Any) -> Iterator[Batch]:
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(len(ids) for _, ids in part)
        ids = torch.full((len(part), width), tokenizer.eos_token_id or 0)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for i, (_, row) in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        yield Batch({"input_ids": ids, "attention_mask": mask}, mask[:, 1:].bool(), [name for name, _ in part])
