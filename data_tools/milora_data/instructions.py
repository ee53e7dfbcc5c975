"""Instruction sets of text alone as LLaVA records, and the records that LLM-Adapters holds out of them.

Fields as in Stanford Alpaca and AGI-Edgerunners/LLM-Adapters (commonsense_170k.json), and as in MetaMathQA; `system`
and `history` as in LLaMA-Factory's form of Alpaca.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.errors import DataError
from milora_data.tables import read_rows
from milora_data.vqa_files import Options, Records, record

FIELDS = (("instruction", "output"), ("query", "response"))
SEED = 42


def instructions(sources: Sequence[Path], options: Options) -> Records:
    """{"instruction", "input"?, "output"} or {"query", "response"}, a list or one a line; the texts stay as they are.

    What was said before (`history`) and a `system` text go in front. Raises `DataError` without such fields.
    """
    for path in sources:
        for number, (place, value) in enumerate(read_rows(path), start=1):
            fields, where = value if isinstance(value, Mapping) else {}, f"{path}:{place}"
            exchanges = [*earlier(fields, where), _exchange(fields, where)]
            yield with_system(record(fields.get("id", number), None, exchanges), fields.get("system"))


def with_input(instruction: str, given: str) -> str:
    """Return a question whose input, where there is one, stands below its instruction, on a line of its own."""
    return f"{instruction}\n{given}" if given else instruction


def earlier(row: Mapping[str, Any], place: str) -> list[tuple[str, str]]:
    """Return the exchanges of `history`, a list of pairs; raises `DataError` for anything else."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise DataError(f"{place}: history must be a list of pairs [question, answer], got {str(history)[:80]}")
    return [(str(question), str(answer)) for question, answer in history]


def with_system(made: dict[str, Any], text: object) -> dict[str, Any]:
    """Put a system turn in front of the record's others, where there is a text for it."""
    if text:
        made["conversations"].insert(0, {"from": "system", "value": str(text)})
    return made


def held_out(num_records: int, count: int) -> frozenset[int]:
    """Return which of `num_records` records are held out: those of `train_test_split(count, seed=42)` of `datasets`.

    Raises `DataError` where no record would be left to train on.

    >>> sorted(held_out(10, 3))
    [0, 5, 6]
    """
    import numpy as np

    if count >= num_records:
        raise DataError(f"--hold_out {count}: there are {num_records:,} records, and none would be left to train on")
    return frozenset(np.random.default_rng(SEED).permutation(num_records)[:count].tolist())


def _exchange(fields: Mapping[str, Any], place: str) -> tuple[str, str]:
    given = fields.get("input") or ""
    for names in FIELDS:
        question, answer = (fields.get(name) for name in names)
        if isinstance(question, str) and isinstance(answer, str) and isinstance(given, str):
            return with_input(question, given), answer
    expected = " or ".join(f"{first} and {second}" for first, second in FIELDS)
    raise DataError(f"{place}: expected an object with the texts {expected}; it has {', '.join(fields) or 'none'}")
