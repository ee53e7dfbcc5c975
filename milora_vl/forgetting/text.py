"""The text probe of forgetting: three books of the package, in blocks and batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from torch import Tensor

from milora_data.encode.tokens import bos_ids
from milora_vl.core.calibration.texts import padded


@dataclass(frozen=True, slots=True)
class ProbeBatch:
    """The input of both models: forward arguments with `input_ids` (rows, length).

    `counted` (rows, length - 1) marks the predictions that count: position t predicts id t + 1. `documents` names the
    document of each row: predictions in one document are not independent of each other.
    """

    inputs: Mapping[str, Tensor]
    counted: Tensor
    documents: Sequence[str]


def general_text() -> dict[str, str]:
    """Return the texts of the package by name: parts of three public-domain books (general_text/)."""
    folder = files("milora_vl.forgetting") / "general_text"
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
) -> Iterator[ProbeBatch]:
    yield from padded_batches(
        text_blocks(texts, tokenizer, num_tokens=num_tokens, block_length=block_length), batch_size, tokenizer
    )


def ends_of(tokenizer: Any) -> tuple[int, int]:
    """Return the ids that start and end a text: BOS, or EOS without a BOS, and EOS."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return (eos if bos is None else bos), eos


def padded_batches(rows: Sequence[tuple[str, list[int]]], batch_size: int, tokenizer: Any) -> Iterator[ProbeBatch]:
    """Yield rows of ids, each with the name of its document, in batches padded on the right."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        inputs = padded([ids for _, ids in part], tokenizer.eos_token_id or 0)
        yield ProbeBatch(inputs, inputs["attention_mask"][:, 1:].bool(), [name for name, _ in part])
