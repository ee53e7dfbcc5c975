"""Records of a training in little memory."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from milora_data.records.record import CompactRecords, Record, Turn

MEGABYTE = 1 << 20


def many(count: int) -> list[Record]:
    return [Record(str(i), (f"{i}.png",), (Turn("user", f"{i} " * 50), Turn("assistant", "b"))) for i in range(count)]


def test_it_is_a_sequence_of_the_same_records() -> None:
    records = many(7)
    compact = CompactRecords(records)
    assert list(compact) == records == list(pickle.loads(pickle.dumps(compact)))
    assert compact[-1] == records[-1]
    assert compact[2:5] == records[2:5]
    with pytest.raises(IndexError):
        compact[7]
    assert not CompactRecords([])


def private() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(map(int, re.findall(r"Private_Dirty: +(\d+)", text)))


def growth(records: Sequence[Record], said: Any) -> None:
    before = private()
    assert sum(len(record.turns[0].text) for record in records)
    said.put(private() - before)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="how much memory is one's own, Linux says")
def test_a_loader_process_shares_them() -> None:
    context = multiprocessing.get_context("fork")

    def grown(records: Sequence[Record]) -> int:
        said = context.SimpleQueue()
        process = context.Process(target=growth, args=(records, said))
        process.start()
        process.join()
        return int(said.get())

    records = many(40_000)
    assert grown(CompactRecords(records)) < 2 * MEGABYTE
    assert sys.getsizeof(records) < grown(records)  # what a list costs
