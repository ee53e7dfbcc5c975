"""Records as a stream through `datasets`: its shards, shuffle buffer, split by node and worker, and interleaving.

Nothing is read but what is due, so a set may be larger than memory, or lie on the hub. A row of the stream is a record
as bytes (whatever the format it was read from); what is broken in a source comes as a `DataError` in its place.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from datasets.distributed import split_dataset_by_node

from milora_data.errors import DataError, UserError
from milora_data.jsonfile import Part, parts_of, read_part
from milora_data.mix import Source, read_sources, within
from milora_data.records import Record, is_json, parse_record
from milora_data.stored import HUB, broken_off, files_of, items_of_file, open_hub, row_to_record

StreamItem: TypeAlias = Record | DataError
FEATURES = datasets.Features({"record": datasets.Value("large_binary")})
MIN_PARTS = 64  # of a JSON file: many small ones mix better, and every process gets its share


class RecordStream(torch.utils.data.IterableDataset[StreamItem]):
    """An endless stream of the records of `rows`, epoch after epoch, each in an order of its own.

    It goes on where another one was: `state_dict` holds the epoch and what came of it. With a shuffle buffer, whose
    content `datasets` does not keep, the rows of the epoch so far are read again (not decoded), so that exactly those
    that are due follow; without one the state of `datasets` itself leads there at once.
    """

    def __init__(self, rows: datasets.IterableDataset, seed: int, *, buffered: bool) -> None:
        self.rows, self.seed, self.buffered = rows, seed, buffered
        self._epoch, self._done = 0, 0

    def __iter__(self) -> Iterator[StreamItem]:
        # Loader processes would share the number of the epoch with each other.
        self.rows = deepcopy(self.rows)
        while True:
            self.rows.set_epoch(1 + self.seed + self._epoch)  # from 1 on, shards come in random order
            try:
                for row in islice(self.rows, self._done if self.buffered else 0, None):
                    self._done += 1
                    yield pickle.loads(row["record"])
            except Exception as error:  # files answer for themselves; a hub may be anything
                raise broken_off(f"a source of the hub, after {self._done:,} records", error) from None
            if self._done == 0:
                return  # more loader processes than shards: there is nothing for this one
            self._epoch, self._done = self._epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on behind the last record."""
        rows = None if self.buffered else self.rows.state_dict()
        return {"epoch": self._epoch, "done": self._done, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream was that gave `state`, of the same source, seed and number of processes."""
        self._epoch, self._done = state["epoch"], state["done"]
        if state["rows"] is not None:
            self.rows.load_state_dict(state["rows"])


def record_stream(
    sources: str | Path | Sequence[Source],
    *,
    seed: int = 0,
    shuffle_buffer: int = 1000,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> RecordStream:
    """Return the endless stream of one file (or hub:NAME, or a mixture in YAML), or of several sources.

    Of several, one is drawn for each record, by their weights (`datasets.interleave_datasets`). Shards come in random
    order, and `shuffle_buffer` rows are mixed at a time (0: none). `rank` of `world_size` processes gets its share.
    Raises `UserError`: no such file, no source with a weight.
    """
    used = [source for source in _sources(sources) if source.weight > 0]
    if not used:
        raise UserError("no source has a weight above 0")
    opened = [_rows(source, world_size * max(num_workers, 1)) for source in used]
    rows = opened[0]
    if len(opened) > 1:
        total = sum(source.weight for source in used)
        shares = [source.weight / total for source in used]
        rows = datasets.interleave_datasets(opened, shares, seed=seed, stopping_strategy="all_exhausted")
    if shuffle_buffer:
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
    if world_size > 1:
        rows = split_dataset_by_node(rows, rank, world_size)
    return RecordStream(rows, seed, buffered=bool(shuffle_buffer))


def _sources(given: str | Path | Sequence[Source]) -> Sequence[Source]:
    if not isinstance(given, str | Path):
        return given
    return read_sources(Path(given))[0] if str(given).endswith((".yaml", ".yml")) else [Source(str(given))]


def _rows(source: Source, processes: int) -> datasets.IterableDataset:
    """Return the rows of one source: {"record": the bytes of a `Record`, or of the `DataError` in its place}."""
    if is_json(source.path):
        count = -(-MIN_PARTS // processes) * processes
        parts = parts_of(Path(source.path), count, processes)
        if not parts:
            raise DataError(f"{source.path}: no records")
        return datasets.IterableDataset.from_generator(
            _json_rows, features=FEATURES, gen_kwargs={"parts": parts, "image_folder": source.image_folder}
        )
    if source.path.endswith((".yaml", ".yml")):
        raise UserError(f"{source.path}: a mixture within a mixture cannot be streamed")
    if not source.path.startswith(HUB):
        files = {"files": files_of(source.path), "image_folder": source.image_folder}
        return datasets.IterableDataset.from_generator(_stored_rows, features=FEATURES, gen_kwargs=files)
    stored = open_hub(source.path)
    return stored.map(
        _hub_row,
        fn_kwargs={"source": source.path, "image_folder": source.image_folder},
        with_indices=True,
        remove_columns=stored.column_names,
        features=FEATURES,
    )


def _json_rows(parts: list[Part], image_folder: str | None) -> Iterator[dict[str, bytes]]:
    for part in parts:
        broken: list[DataError] = []
        try:
            for place, value in read_part(part, broken.append):
                yield from _drained(broken)
                yield _row(_json_item(value, f"{part.path}:{place}", image_folder))
        except DataError as error:  # of a list, nothing is read behind a break
            broken.append(error)
        yield from _drained(broken)


def _json_item(value: object, source: str, image_folder: str | None) -> StreamItem:
    try:
        return within(parse_record(value, source=source), image_folder)
    except DataError as error:
        return error


def _drained(broken: list[DataError]) -> Iterator[dict[str, bytes]]:
    while broken:
        yield _row(broken.pop(0))


def _stored_rows(files: list[str], image_folder: str | None) -> Iterator[dict[str, bytes]]:
    for file in files:
        for item in items_of_file(file):
            yield _row(item if isinstance(item, DataError) else within(item, image_folder))


def _hub_row(row: Mapping[str, Any], number: int, source: str, image_folder: str | None) -> dict[str, bytes]:
    try:
        # The number is one within a shard: a name of the row's own, where it has one, says more.
        name = str(row.get("id") or row.get("__key__") or number)
        return _row(within(row_to_record(row, f"{source}:{name}", name), image_folder))
    except DataError as error:
        return _row(error)


def _row(item: StreamItem) -> dict[str, bytes]:
    return {"record": pickle.dumps(item, pickle.HIGHEST_PROTOCOL)}
