"""Records in little memory, shared by loader processes: stored as bytes, and unpickled when they are read.

A list of a million objects is copied page by page into each loader process, because reading an object changes its
reference count. The bytes and two arrays of offsets are shared by all processes. Make them from an iterator: then the
objects never exist together.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

from milora_data.records.record import Record


class CompactRecords(Sequence[Record]):
    """A sequence of records that are unpickled on each access. Consecutive repeats of a record are stored once.

    >>> records = CompactRecords([Record("a", (), ()), Record("b", (), ())])
    >>> len(records), records[1].id, [record.id for record in records[:1]]
    (2, 'b', ['a'])
    """

    def __init__(self, records: Iterable[Record]) -> None:
        content = bytearray()
        self._starts, self._ends = array("q"), array("q")
        self._content = content
        last, start = None, 0
        for record in records:
            if record is not last:
                last, start = record, len(content)
                content += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
            self._starts.append(start)
            self._ends.append(len(content))

    def only(self, places: Iterable[int]) -> CompactRecords:
        """Return the records at these places, in this order; they share their bytes with this sequence."""
        chosen = CompactRecords(())
        chosen._content = self._content
        for place in places:
            chosen._starts.append(self._starts[place])
            chosen._ends.append(self._ends[place])
        return chosen

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...

    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        record: Record = pickle.loads(memoryview(self._content)[self._starts[place] : self._ends[place]])
        return record
