"""Instruction sets of text alone as LLaVA records, and the records that LLM-Adapters holds out of them.

Fields as in Stanford Alpaca and AGI-Edgerunners/LLM-Adapters (commonsense_170k.json), and as in MetaMathQA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import DataError
from .jsonfile import read_objects
from .vqa_files import Options, Records, record

FIELDS = (("instruction", "output"), ("query", "response"))
SEED = 42


def instructions(sources: Sequence[Path], options: Options) -> Records:
    """{"instruction", "input"?, "output"} or {"query", "response"}, a list or one a line; the texts stay as they are.

    An input that is not empty goes below its instruction, on a line of its own. Raises `DataError` without such fields.
    """
    for path in sources:
        for line, value in read_objects(path):
            fields = value if isinstance(value, Mapping) else {}
            yield record(fields.get("id", line), None, [_exchange(fields, f"{path}:{line}")])


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
            return f"{question}\n{given}" if given else question, answer
    expected = " or ".join(f"{first} and {second}" for first, second in FIELDS)
    raise DataError(f"{place}: expected an object with the texts {expected}; it has {', '.join(fields) or 'none'}")
