"""Convert text-only instruction data to LLaVA records, and select the records that LLM-Adapters holds out.

Fields as in Stanford Alpaca and AGI-Edgerunners/LLM-Adapters (commonsense_170k.json), and as in MetaMathQA; `system`
and `history` as in LLaMA-Factory's form of Alpaca.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.formats.tables import read_rows
from milora_data.formats.vqa_files import Options, Records, record
from milora_vl.base.errors import DataError

FIELDS = (("instruction", "output"), ("query", "response"))
SEED = 42


def instructions(sources: Sequence[Path], options: Options) -> Records:
    """{"instruction", "input"?, "output"} or {"query", "response"}, as a list or one per line; texts are not changed.

    A `system` text and the exchanges of `history` come first. Raises `DataError` if the fields are missing.
    """
    for path in sources:
        for number, (place, value) in enumerate(read_rows(path), start=1):
            fields, where = value if isinstance(value, Mapping) else {}, f"{path}:{place}"
            exchanges = [*earlier(fields, where), _exchange(fields, where)]
            yield with_system(record(fields.get("id", number), None, exchanges), fields.get("system"))


def with_input(instruction: str, text: str) -> str:
    """Return the instruction, followed by the input `text` on a new line if there is one."""
    return f"{instruction}\n{text}" if text else instruction


def earlier(row: Mapping[str, Any], place: str) -> list[tuple[str, str]]:
    """Return the exchanges of `history`, a list of pairs; raises `DataError` for anything else."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(
            f"history must be a list of pairs [question, answer], got {str(history)[:80]}",
            code="instructions-history",
            where=place,
        )
    return [(str(question), str(answer)) for question, answer in history]


def with_system(converted: dict[str, Any], text: object) -> dict[str, Any]:
    """Insert a system turn at the start of a record if `text` is not empty."""
    if text:
        converted["conversations"].insert(0, {"from": "system", "value": str(text)})
    return converted


def held_out(num_records: int, count: int) -> frozenset[int]:
    """Return the indices of the held-out records, equal to `train_test_split(count, seed=42)` of `datasets`.

    Raises `DataError` if no record would be left for training.

    >>> sorted(held_out(10, 3))
    [0, 5, 6]
    """
    import numpy as np

    if count >= num_records:
        raise DataError(
            f"{count:,} of {num_records:,} records leave none for training",
            code="hold-out-too-large",
            where="--hold_out",
            hint="hold out fewer records",
        )
    return frozenset(np.random.default_rng(SEED).permutation(num_records)[:count].tolist())


def _exchange(fields: Mapping[str, Any], place: str) -> tuple[str, str]:
    text = fields.get("input") or ""
    for names in FIELDS:
        question, answer = (fields.get(name) for name in names)
        if isinstance(question, str) and isinstance(answer, str) and isinstance(text, str):
            return with_input(question, text), answer
    expected = " or ".join(f"{first} and {second}" for first, second in FIELDS)
    raise DataError(
        f"expected an object with the texts {expected}; it has {', '.join(fields) or 'none'}",
        code="table-missing-columns",
        where=place,
    )
