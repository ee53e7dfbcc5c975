"""Stream records (`data.streaming`): shards, shuffle buffer and seed, split by node and worker, interleaving.

Records are read when they are needed, so a data set may be larger than memory, or on the hub. Each row of the stream
is a pickled `Record`, independent of the source's format, or a pickled `DataError` in place of a broken record.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from datasets.distributed import split_dataset_by_node

from milora_data.formats.jsonfile import FilePart, parts_of, read_part
from milora_data.formats.stored import HUB, broken_off, files_of, is_stored, items_of_file, open_hub, row_to_record
from milora_data.records import identifier_of
from milora_data.records.record import Record
from milora_data.stream import Source, json_items, within
from milora_vl.common.errors import DataError, UserError, no_records

StreamItem: TypeAlias = Record | UserError
FEATURES = datasets.Features({"record": datasets.Value("large_binary")})
MIN_PARTS = 64  # parts of a JSON file: many small parts mix better, and each process gets some


@dataclass(eq=False)
class RecordStream(torch.utils.data.IterableDataset[StreamItem]):
    """An endless stream of the records of `rows`; each epoch has a different order.

    `state_dict` holds the epoch and the number of records read in it, so that a stream can be resumed. `datasets` does
    not save the content of its shuffle buffer, so the rows of the epoch are read again (not decoded) up to
    the saved number. Without a shuffle buffer, the state of `datasets` restores the position directly.
    """

    rows: datasets.IterableDataset
    seed: int
    buffered: bool
    _epoch: int = 0
    _done: int = 0
    _position: dict[str, Any] | None = None  # in `rows`

    def __iter__(self) -> Iterator[StreamItem]:
        # `set_epoch` writes to shared memory, and loader processes may be in different epochs. The one part of this
        # split has its own epoch. A deep copy would read the hub's cache while other threads write to it.
        self.rows = split_dataset_by_node(self.rows, 0, 1)
        if self._position is not None:
            self.rows.load_state_dict(self._position)
        while True:
            self.rows.set_epoch(1 + self.seed + self._epoch)  # epoch 0 would not shuffle the shards
            try:
                for row in islice(self.rows, self._done if self.buffered else 0, None):
                    self._done += 1
                    yield pickle.loads(row["record"])
            except Exception as error:  # files yield their errors as items; the hub raises exceptions of any type
                broken = broken_off(f"a source of the hub, after {self._done:,} records", error)
                if torch.utils.data.get_worker_info() is None:
                    raise broken from None
                yield UserError(problems=broken.problems)  # torch passes no exception on; the collator never skips it
                return
            if self._done == 0:
                return  # more loader processes than shards: this one has no data
            self._epoch, self._done = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        rows = None if self.buffered else self.rows.state_dict()
        return {"epoch": self._epoch, "done": self._done, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, which must come from a stream with the same source, seed and number of processes."""
        self._epoch, self._done, self._position = state["epoch"], state["done"], state["rows"]


def record_stream(
    sources: Sequence[Source],
    *,
    seed: int = 0,
    shuffle_buffer: int = 1000,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> RecordStream:
    """Return the endless stream of one or several sources.

    With several sources, each record comes from a source drawn with the probability of its weight
    (`datasets.interleave_datasets`). Shards are shuffled, and `shuffle_buffer` rows are shuffled at a time (0: none).
    `rank` of `world_size` processes gets its part of the rows.
    Raises `UserError` if a file is missing or no source has a weight above 0.
    """
    used = [source for source in sources if source.weight > 0]
    if not used:
        hint = "set a weight above 0 for at least one source"
        raise UserError("no source has a weight above 0", hint=hint)
    opened = [_rows(source, world_size * max(num_workers, 1)) for source in used]
    rows = opened[0]
    if len(opened) > 1:
        total = sum(source.weight for source in used)
        probabilities = [source.weight / total for source in used]
        rows = datasets.interleave_datasets(opened, probabilities, seed=seed, stopping_strategy="all_exhausted")
    if shuffle_buffer:
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
    if world_size > 1:
        rows = split_dataset_by_node(rows, rank, world_size)
    return RecordStream(rows, seed, buffered=bool(shuffle_buffer))


def _rows(source: Source, processes: int) -> datasets.IterableDataset:
    """Return the rows of one source: {"record": pickled `Record` or `DataError`}."""
    if source.path.startswith(HUB):
        stored = open_hub(source.path)
        return stored.map(
            _hub_row,
            fn_kwargs={"source": source.path, "image_folder": source.image_folder},
            with_indices=True,
            remove_columns=stored.column_names,
            features=FEATURES,
        )
    if is_stored(source.path):
        files = {"files": files_of(source.path), "image_folder": source.image_folder}
        return datasets.IterableDataset.from_generator(_stored_rows, features=FEATURES, gen_kwargs=files)
    count = -(-MIN_PARTS // processes) * processes
    parts = parts_of(Path(source.path), count, processes)
    if not parts:
        raise DataError(problems=[no_records(source.path)])
    return datasets.IterableDataset.from_generator(
        _json_rows, features=FEATURES, gen_kwargs={"parts": parts, "image_folder": source.image_folder}
    )


def _json_rows(parts: list[FilePart], image_folder: str | None) -> Iterator[dict[str, bytes]]:
    for part in parts:
        for item in json_items(part.path, partial(read_part, part)):
            yield _row(within(item, image_folder))


def _stored_rows(files: list[str], image_folder: str | None) -> Iterator[dict[str, bytes]]:
    for file in files:
        for item in items_of_file(file):
            yield _row(within(item, image_folder))


def _hub_row(row: Mapping[str, Any], number: int, source: str, image_folder: str | None) -> dict[str, bytes]:
    try:
        # `number` counts within a shard and is not unique: prefer the id of the row.
        name = identifier_of(row, ("id", "__key__"), number)
        return _row(within(row_to_record(row, f"{source}:{name}", name), image_folder))
    except DataError as error:
        return _row(error)


def _row(item: StreamItem) -> dict[str, bytes]:
    return {"record": pickle.dumps(item, pickle.HIGHEST_PROTOCOL)}
