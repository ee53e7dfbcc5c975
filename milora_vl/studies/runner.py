"""Run the cells of a study in worker processes, each of which holds the task once; resumable after any kind of end.

cells/NAME.json is a cell's numbers, items/NAME.json the scores of its test items, failed/NAME.json why it has none.
A cell that another study in the same folder of studies has trained already is taken from there (../shared).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from milora_vl.studies.study import Study
from milora_vl.studies.task import Task
from milora_vl.studies.train import Result
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.results import arms
from milora_vl.sweep.store import read_json, write_json

OnDone = Callable[[Cell, bool, int], None]


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a study keeps what it has."""

    path: Path

    def result(self, cell: Cell) -> Result | None:
        """The numbers of a cell; None for one that is not finished."""
        return read_json(self.path / "cells" / f"{cell.name}.json")

    def items(self, cell: Cell) -> dict[str, float]:
        """The score of each test item of a finished cell."""
        return read_json(self.path / "items" / f"{cell.name}.json") or {}

    def failure(self, cell: Cell) -> Result | None:
        """Why a cell has no result; None where it has one, or has not been tried."""
        return None if self.result(cell) else read_json(self.path / "failed" / f"{cell.name}.json")

    def shared(self, key: str) -> Path:
        """Where any study keeps a cell that is trained in this way."""
        return self.path.parent / "shared" / f"{key}.json"

    def keep(self, cell: Cell, result: Result, items: dict[str, float]) -> None:
        """Write a finished cell: the numbers last, for they say that it is finished."""
        write_json(self.path / "items" / f"{cell.name}.json", items)
        write_json(self.path / "cells" / f"{cell.name}.json", result)
        (self.path / "failed" / f"{cell.name}.json").unlink(missing_ok=True)

    def keep_failure(self, cell: Cell, said: str) -> None:
        """Write why a cell has no result."""
        write_json(self.path / "failed" / f"{cell.name}.json", {"said": said})


def all_cells(study: Study, folder: Folder) -> list[Cell]:
    """The cells that are known by now: the search, and the further seeds of each arm whose best rate it has found."""
    searched = study.cells(range(study.search_seeds or study.seeds))
    results = finished(searched, folder)
    if any(cell not in results and folder.failure(cell) is None for cell in searched):
        return searched
    further = range(study.search_seeds or study.seeds, study.seeds)
    best = [arm.best for arm in arms(results, study.search_seeds or study.seeds) if arm.best]
    return searched + [Cell(point.method, point.learning_rate, None, seed) for seed in further for point in best]


def run_study(study: Study, folder: Folder, jobs: int, *, retry: bool, on_done: OnDone) -> None:
    """Run every cell without a result, first the search and then the further seeds; failed ones only with `retry`."""
    tried: set[Cell] = set()
    while todo := _left(study, folder, tried, retry=retry):
        tried.update(todo)
        with ProcessPoolExecutor(
            min(jobs, len(todo)), multiprocessing.get_context("spawn"), _start, (study, folder.path, jobs)
        ) as pool:
            futures = {pool.submit(_run, cell): cell for cell in todo}
            for left, future in enumerate(as_completed(futures), start=1):
                on_done(futures[future], future.result(), len(todo) - left)


def _left(study: Study, folder: Folder, tried: set[Cell], *, retry: bool) -> list[Cell]:
    return [
        cell
        for cell in all_cells(study, folder)
        if cell not in tried and folder.result(cell) is None and (retry or folder.failure(cell) is None)
    ]


# What a worker process holds for all its cells.
_held: tuple[Task, Study, Folder] | None = None


def _start(study: Study, path: Path, jobs: int) -> None:
    import torch

    from milora_vl.studies.tasks import load_task

    global _held
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    _held = load_task(study.task), study, Folder(path)


def _end_with_parent() -> None:
    """A killed command must not leave workers behind, which would train what the next one trains too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run(cell: Cell) -> bool:
    from milora_vl.studies.train import run_cell

    assert _held is not None
    task, study, folder = _held
    try:
        shared = folder.shared(study.key(cell))
        known = read_json(shared)
        if known is None:
            result, items = run_cell(task, study, cell, folder.path.parent / "factors")
            write_json(shared, known := {"result": result, "items": items})
        folder.keep(cell, known["result"] | {"method": cell.method}, known["items"])
    except Exception:  # a cell that fails must not end the others: it is kept, shown and can be tried again
        folder.keep_failure(cell, traceback.format_exc(limit=-6))
        return False
    return True


def finished(cells: Sequence[Cell], folder: Folder) -> dict[Cell, Result]:
    """The results that are there."""
    return {cell: result for cell in cells if (result := folder.result(cell)) is not None}
