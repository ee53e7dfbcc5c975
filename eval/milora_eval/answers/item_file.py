"""Questions on disk instead of in memory, so a million questions take little of it."""

from __future__ import annotations

import errno
import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from tempfile import SpooledTemporaryFile
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from milora_eval.answers.selection import group_order
from milora_eval.benchmark import Item
from milora_vl.base.errors import UserError

IN_MEMORY = 8 << 20  # bytes of items that need no file; at least 1
RECENT = 1024  # items that stay in memory: the items of a batch are read at each of its tokens
# a full disk, a quota, a limit of the size of files, and no folder at all that takes a file
NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOENT)


class _Open:
    """A temporary file that is closed with the last sequence that reads it."""

    def __init__(self) -> None:
        self.file = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115
        self.close = weakref.finalize(self, _close, self.file)

    def write(self, item: Item | None = None) -> None:
        """Write an item; without one, everything that a buffer still holds."""
        try:
            if item is None:
                self.file.flush()
            else:
                pickle.dump(item, self.file, pickle.HIGHEST_PROTOCOL)
        except OSError as error:
            if error.errno not in NOT_WRITTEN:
                raise
            folder = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")
            raise UserError(
                f"the questions cannot be written to the temporary folder {folder}: {error.strerror}",
                code="disk-full",
                where="TMPDIR",
                hint="free some space, or name a folder on another disk:  export TMPDIR=FOLDER",
                exit_code=1,
            ) from None


def _close(file: Any) -> None:
    with suppress(OSError):  # a full disk
        file.close()


class ItemFile(Sequence[Item]):
    """A sequence of items in a temporary file without a name, which the system removes when the process ends.

    `orders` are the places of the items' groups in the order in which pictures are selected, `id_hashes` the hashes
    of their ids.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        """Write `items`. A folder for large files is set by TMPDIR. Raises UserError if it is full."""
        self._open = _Open()
        starts, orders, hashes = array("Q"), array("Q"), array("q")
        try:
            for item in items:
                starts.append(self._open.file.tell())
                orders.append(group_order(item.group))
                hashes.append(hash(item.id))
                self._open.write(item)
            self._open.write()
        except BaseException:
            self._open.close()
            raise
        self._starts, self.orders = np.frombuffer(starts, np.uint64), np.frombuffer(orders, np.uint64)
        self.id_hashes = np.frombuffer(hashes, np.int64)
        self._recent = lru_cache(RECENT)(self._read)

    def take(self, places: NDArray[np.int64]) -> ItemFile:
        """Return the items at `places`, from the same file."""
        taken = object.__new__(ItemFile)
        taken._open = self._open
        taken._starts, taken.orders = self._starts[places], self.orders[places]
        taken.id_hashes = self.id_hashes[places]
        taken._recent = lru_cache(RECENT)(taken._read)
        return taken

    def forget_ids(self) -> None:
        """Free the hashes of the ids."""
        self.id_hashes = self.id_hashes[:0]

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Item]: ...
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return self._recent(int(self._starts[place]))

    def __iter__(self) -> Iterator[Item]:
        return (self._read(int(start)) for start in self._starts)

    def _read(self, start: int) -> Item:
        self._open.file.seek(start)
        item = pickle.load(self._open.file)
        assert isinstance(item, Item)
        return item
