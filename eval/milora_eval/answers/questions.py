"""Read the questions of an evaluation before a model loads; check names, ids and pictures."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from milora_eval.answers.identity import answer_key
from milora_eval.answers.item_file import ItemFile
from milora_eval.answers.selection import Orders, selected
from milora_eval.benchmark import Benchmark, Item, MissingData
from milora_eval.data_files import load_items
from milora_eval.suites import folder_of
from milora_vl.base.errors import UserError

Items = dict[str, ItemFile]
"""The items of each benchmark, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """The benchmarks and the generation settings. `suite` names the results; `shard` is (number from 1, count).

    `audit` is the number of items that are asked a second time, one by one. `which` (base, final, checkpoint-N),
    `model_name`, `adapter` and `scale` (of its update) name the weights that answer; `settings` is everything except
    the question that their answers depend on.
    """

    suite: str
    benchmarks: tuple[Benchmark, ...]
    data_dir: Path
    template: str = "vicuna_v1"
    image_aspect_ratio: Literal["pad", "plain", "anyres"] = "pad"
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)
    batch_size: int = 16
    audit: int = 0
    which: str = "final"
    model_name: str = ""
    adapter: str | Path | None = None
    scale: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """An item of a benchmark with the key of its answer."""

    benchmark: Benchmark
    item: Item
    key: str


def read_items(benchmarks: Sequence[Benchmark], data_dir: Path, limit: int | None = None) -> Items:
    """Read the items of some benchmarks, for all shards.

    Raises UserError for missing data, missing pictures, duplicate ids and two benchmarks with one name.
    """
    _check_names(benchmarks)
    result: Items = {}
    missing: dict[str, MissingData] = {}
    for benchmark in benchmarks:
        try:
            loaded = ItemFile(load_items(benchmark, folder_of(benchmark, data_dir)))
        except MissingData as error:
            missing[benchmark.name] = error
            continue
        items = loaded if limit is None else loaded.take(selected(loaded.orders, limit))
        if not items:
            raise UserError(
                f"no questions in the data of benchmark {benchmark.name} in {data_dir}",
                code="benchmark-empty",
                where="--data",
                hint="download the files of the benchmark again; python -m milora_eval ls  lists them",
            )
        _check_ids(benchmark, items)
        _check_pictures(benchmark, items)
        result[benchmark.name] = items
    if missing:
        first, *others = missing
        problem, *further = missing[first].problems
        hint = [problem.hint]
        if others:
            hint += [f"the files of {', '.join(others)} are missing too: python -m milora_eval ls --data {data_dir}"]
        if available := ",".join(benchmark.name for benchmark in benchmarks if benchmark.name not in missing):
            hint += [f"without them: --benchmarks {available}"]
        raise MissingData(problems=[replace(problem, hint="\n".join(filter(None, hint))), *further])
    return result


class Questions(Sequence[Question]):
    """The items of the plan's benchmarks, each with the key of its answer.

    A question is read when it is asked for: a million of them take the memory of two numbers each, `keys` and `orders`.
    """

    def __init__(self, plan: EvaluationPlan, items: Items) -> None:
        self._parts = [(benchmark, items[benchmark.name]) for benchmark in plan.benchmarks]
        self._firsts = [0, *accumulate(len(part) for _, part in self._parts)]
        keys = (int(answer_key(plan.settings, one, item), 16) for one, part in self._parts for item in part)
        self.keys: NDArray[np.uint64] = np.fromiter(keys, np.uint64, len(self))
        self.orders: Orders = np.concatenate([part.orders for _, part in self._parts])

    def __len__(self) -> int:
        return self._firsts[-1]

    @overload
    def __getitem__(self, place: int) -> Question: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Question]: ...
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        number = bisect_right(self._firsts, place) - 1
        benchmark, items = self._parts[number]
        return Question(benchmark, items[place - self._firsts[number]], f"{int(self.keys[place]):016x}")

    def by_benchmark(self, places: NDArray[np.int64]) -> Iterator[tuple[Benchmark, NDArray[np.int64]]]:
        """Yield each benchmark with its own part of `places`, which ascend."""
        ends = np.searchsorted(places, self._firsts)
        for (benchmark, _), start, end in zip(self._parts, ends, ends[1:], strict=False):
            yield benchmark, places[start:end]


def _check_names(benchmarks: Sequence[Benchmark]) -> None:
    seen: set[str] = set()
    for benchmark in benchmarks:
        if benchmark.name in seen:  # its numbers and files would replace the other's
            raise UserError(
                f"the benchmark {benchmark.name} is listed twice",
                code="eval-duplicate-benchmark",
                hint="use a separate --output_dir for each protocol, or for each file with the same name",
            )
        seen.add(benchmark.name)


def _check_ids(benchmark: Benchmark, items: ItemFile) -> None:
    hashes, counts = np.unique(items.id_hashes, return_counts=True)
    seen: set[str] = set()
    for place in np.flatnonzero(np.isin(items.id_hashes, hashes[counts > 1])).tolist():
        if items[place].id in seen:
            raise UserError(
                f'the id "{items[place].id}" appears twice in the questions',
                code="benchmark-duplicate-id",
                where=f"benchmark {benchmark.name}",
                hint="give every question its own id",
            )
        seen.add(items[place].id)
    items.forget_ids()


def _check_pictures(benchmark: Benchmark, items: ItemFile) -> None:
    missing: set[str] = set()
    before: tuple[str, ...] = ()
    for item in items:
        if item.images != before:  # questions about one picture usually follow each other
            missing.update(image for image in item.images if not Path(image).is_file())
        before = item.images
    if missing:
        shown = [*sorted(missing)[:3], *(["..."] if len(missing) > 3 else [])]
        folders = [names.removesuffix("|.") for names in benchmark.files if names.endswith("|.")]
        shown += [f"put their folder next to the questions: {names.replace('|', ' or ')}" for names in folders]
        raise UserError(
            f"{len(missing)} pictures of benchmark {benchmark.name} are missing",
            code="benchmark-missing-pictures",
            where="--data",
            hint="\n".join([*shown, "or name the folder with the pictures:  --data FOLDER"]),
        )
