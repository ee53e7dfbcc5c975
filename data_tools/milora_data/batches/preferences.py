"""Pairs of answers, one preferred to the other, as batches for TRL's DPOTrainer (DPO: arXiv:2305.18290).

A pair becomes two records, which a collator of this package collates like any others: the same ids, masks and pixels as
in supervised training. Only the last answer counts for the preference, so `completion_mask` has no earlier answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import get_worker_info

from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.tokens import IGNORE
from milora_data.records.record import IMAGE, SPEAKERS, Record, parse_record
from milora_vl.common.compat.torch import FailedBatch
from milora_vl.common.errors import DataError, UserError, with_context

SIDES = ("chosen", "rejected")


class PreferenceCollator:
    """Collates pairs into the batch that TRL's `DPOTrainer` reads; pass it as `data_collator`.

    `__call__` takes the dicts of `pair_of`. It returns input_ids, attention_mask and completion_mask, each (2 x pairs,
    length): the rows of all preferred answers, then the rows of all rejected ones. `collate` makes the other tensors.

    Raises UserError for a collator that skips records, because a pair must stay a pair.
    """

    def __init__(self, collate: RecordCollator[Any]) -> None:
        if collate.bad_images == "skip":
            raise UserError(
                "a record with a broken picture cannot be skipped here: both answers of a pair must be in the batch",
                code="preference-skip",
                where="data.bad_images",
                hint="set it to raise or replace, and run python -m milora_data check",
            )
        self.collate = collate

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of pairs; raises `DataError`."""
        try:
            return self._batch(pairs)
        except UserError as error:
            if get_worker_info() is None:
                raise
            return FailedBatch(error)  # type: ignore[return-value]  # the loader raises it

    def _batch(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        chosen, rejected = zip(*map(pair_of, pairs), strict=True)
        batch = self.collate([*chosen, *rejected])
        if isinstance(batch, FailedBatch):
            return batch
        labels = batch.pop("labels")
        if len(labels) != 2 * len(pairs):
            raise DataError(
                "an answer of this batch is empty or beyond max_length, so its pair is incomplete",
                code="preference-no-answer",
                where=chosen[0].source or chosen[0].id,
                hint="see the warning above; set a larger --max_length, or remove the pair",
            )
        return {**batch, "completion_mask": last_answers(labels).long()}


def pair_of(value: Mapping[str, Any], *, source: str = "") -> tuple[Record, Record]:
    """Return the records of a pair: the conversation with its preferred answer, and with the rejected one.

    Supported are TRL's rows, {"prompt"?, "chosen", "rejected", "images"?}, of texts or messages (without a prompt, both
    answers repeat the conversation), and LLaVA's {"conversations", "chosen", "rejected", "image"?}, whose
    conversation ends with a question.
    Raises `DataError` for another form, several answers, or a picture in an answer.

    >>> good, bad = pair_of({"prompt": "Which colour?", "chosen": "Red.", "rejected": "Blue."})
    >>> good.turns[:-1] == bad.turns[:-1], good.turns[-1].text, bad.turns[-1].text
    (True, 'Red.', 'Blue.')
    """
    try:
        records = [parse_record(_with_answer(value, side)) for side in SIDES]
        for record, side in zip(records, SIDES, strict=True):
            if not record.turns or record.turns[-1].role != "assistant" or IMAGE in record.turns[-1].text:
                raise _malformed(f'"{side}" must end with an answer without pictures')
        first, second = (record.turns[:-1] for record in records)
        if first != second:
            raise _malformed("the two conversations differ before the last answer", "each answer is one message")
    except DataError as error:
        raise with_context(error, source or f"pair {value.get('id', '')!r}") from None
    chosen, rejected = (replace(record, source=source) for record in records)
    return chosen, rejected


def last_answers(labels: torch.Tensor) -> torch.Tensor:
    """Return which tokens are in the last answer of their row, from labels (rows, length): booleans of that shape.

    >>> last_answers(torch.tensor([[-100, 5, -100, 6, 7, -100]])).long()
    tensor([[0, 0, 0, 1, 1, 0]])
    """
    supervised = labels != IGNORE
    begins = supervised.clone()
    begins[:, 1:] &= ~supervised[:, :-1]
    number = begins.cumsum(1)
    return supervised & (number == number[:, -1:])


def _with_answer(value: Mapping[str, Any], side: str) -> dict[str, Any]:
    """Return the record of one side, in LLaVA's form or with messages."""
    value = {key: item for key, item in value.items() if item is not None}  # tables have a column for every key
    missing = [name for name in SIDES if name not in value]
    if missing:
        raise _malformed(f'no "{missing[0]}"; the keys of this pair: {", ".join(map(str, value)) or "none"}')
    others = {key: item for key, item in value.items() if key not in ("prompt", *SIDES)}
    answer = value[side]
    if "conversations" in value:
        if not isinstance(value["conversations"], list):
            raise _malformed('"conversations" must be a list of turns')
        turn = answer if isinstance(answer, Mapping) else {"from": SPEAKERS["assistant"], "value": answer}
        return {**others, "conversations": [*value["conversations"], turn]}
    question = list(_messages(value["prompt"], "user")) if "prompt" in value else []
    messages = [*question, *_messages(answer, "assistant")]
    if not any(isinstance(message, Mapping) and message.get("role") == "user" for message in messages):
        raise _malformed(f"no question before the answer; the keys of this pair: {', '.join(map(str, value))}")
    return {**others, "messages": messages}


def _messages(content: Any, role: str) -> Iterator[Any]:
    if isinstance(content, list):
        yield from content
    else:
        yield {"role": role, "content": content}


def _malformed(message: str, hint: str = "") -> DataError:
    return DataError(message, code="preference-format", hint=hint)
