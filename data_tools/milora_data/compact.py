"""Records of a training in little memory: their bytes, and a `Record` when one is asked for.

A list of a million objects is copied page by page into every loader process, as each look at an object writes to its
reference count. Here there are two arrays, which all processes share.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

from milora_data.records import Record


class CompactRecords(Sequence[Record]):
    """A sequence of records that are made anew each time they are read. A record that follows itself is kept once.

    >>> records = CompactRecords([Record("a", (), ()), Record("b", (), ())])
    >>> len(records), records[1].id, [record.id for record in records[:1]]
    (2, 'b', ['a'])
    """

    def __init__(self, records: Iterable[Record]) -> None:
        content = bytearray()
        self._starts, self._ends = array("q"), array("q")
        last, start = None, 0
        for record in records:
            if record is not last:
                last, start = record, len(content)
                content += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
            self._starts.append(start)
            self._ends.append(len(content))
        self._content = bytes(content)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...

    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        found: Record = pickle.loads(memoryview(self._content)[self._starts[place] : self._ends[place]])
        return found
