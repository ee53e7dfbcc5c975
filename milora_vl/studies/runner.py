"""Run the cells of a study in worker processes, each of which holds the task once; resumable after any kind of end.

cells/NAME.json holds a cell's numbers and the scores of its test items, failed/NAME.json why it has none.
A cell that another study beside it has trained already is taken from the folder that all of them share.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from milora_data.command.atomic_write import read_json, write_json
from milora_data.errors import UserError
from milora_vl.studies.study import Study
from milora_vl.studies.task import Task
from milora_vl.studies.tasks import load_task
from milora_vl.studies.train import Result, run_cell
from milora_vl.sweep.cells import Cell
from milora_vl.sweep.results import arms

OnDone = Callable[[Cell, bool, int], None]


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a study keeps what it has. A cell whose arm has changed since has no result."""

    path: Path
    study: Study

    def result(self, cell: Cell) -> Result | None:
        """The numbers of a cell; None for one that is not finished."""
        kept = self._read("cells", cell)
        return kept["result"] if kept else None

    def items(self, cell: Cell) -> dict[str, float]:
        """The score of each test item of a finished cell."""
        kept = self._read("cells", cell)
        return kept["items"] if kept else {}

    def failure(self, cell: Cell) -> Result | None:
        """Why a cell has no result; None where it has one, or has not been tried."""
        return None if self.result(cell) else self._read("failed", cell)

    def shared(self, cell: Cell) -> Path:
        """Where any study keeps a cell that is trained in this way."""
        return self.path.parent / "shared" / f"{self.study.key(cell)}.json"

    def keep(self, cell: Cell, result: Result, items: dict[str, float]) -> None:
        """Write a finished cell."""
        self._write("cells", cell, {"result": result, "items": items})
        (self.path / "failed" / f"{cell.name}.json").unlink(missing_ok=True)

    def keep_failure(self, cell: Cell, said: str) -> None:
        """Write why a cell has no result."""
        self._write("failed", cell, {"said": said})

    def _read(self, kind: str, cell: Cell) -> dict[str, Any] | None:
        kept = read_json(self.path / kind / f"{cell.name}.json")
        return kept if kept and kept["key"] == self.study.key(cell) else None

    def _write(self, kind: str, cell: Cell, content: dict[str, Any]) -> None:
        write_json(self.path / kind / f"{cell.name}.json", {"key": self.study.key(cell), **content})


def all_cells(folder: Folder) -> list[Cell]:
    """The cells that are known by now: the search, and the further seeds of each arm whose best rate it has found."""
    study = folder.study
    searched = study.cells(range(study.search_seeds or study.seeds))
    results = finished(searched, folder)
    if any(cell not in results and folder.failure(cell) is None for cell in searched):
        return searched
    further = range(study.search_seeds or study.seeds, study.seeds)
    best = [arm.best for arm in arms(results, study.search_seeds or study.seeds) if arm.best]
    return searched + [Cell(point.method, point.learning_rate, None, seed) for seed in further for point in best]


def run_study(folder: Folder, jobs: int, *, retry: bool, on_done: OnDone) -> None:
    """Run every cell without a result, first the search and then the further seeds; failed ones only with `retry`."""
    tried: set[Cell] = set()
    while todo := _left(folder, tried, retry=retry):
        tried.update(todo)
        for left, (cell, is_done) in enumerate(_run_all(folder, todo, jobs), start=1):
            on_done(cell, is_done, len(todo) - left)


def _run_all(folder: Folder, todo: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, bool]]:
    if jobs == 1:
        worker = Worker(load_task(folder.study.task), folder)
        yield from ((cell, worker.run(cell)) for cell in todo)
        return
    start = folder, jobs
    with ProcessPoolExecutor(min(jobs, len(todo)), multiprocessing.get_context("spawn"), _start, start) as pool:
        futures = {pool.submit(_run, cell): cell for cell in todo}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed: where nobody did it, memory ran out\n"
                f"finished cells are kept: the same command goes on, with less memory if you say --jobs {jobs - 1}",
                exit_code=1,
            ) from None


def _left(folder: Folder, tried: set[Cell], *, retry: bool) -> list[Cell]:
    return [
        cell
        for cell in all_cells(folder)
        if cell not in tried and folder.result(cell) is None and (retry or folder.failure(cell) is None)
    ]


@dataclass(frozen=True, slots=True)
class Worker:
    """One process with the task, which it builds once for all its cells."""

    task: Task
    folder: Folder

    def run(self, cell: Cell) -> bool:
        """Train and keep one cell; False where that failed, which is kept too and must not end the others."""
        try:
            shared = self.folder.shared(cell)
            known = read_json(shared)
            if known is None:
                result, items = run_cell(self.task, self.folder.study, cell, self.folder.path.parent / "factors")
                write_json(shared, known := {"result": result, "items": items})
            self.folder.keep(cell, known["result"] | {"method": cell.method}, known["items"])
        except Exception:
            self.folder.keep_failure(cell, traceback.format_exc(limit=-6))
            return False
        return True


_worker: Worker | None = None  # of a worker process


def _start(folder: Folder, jobs: int) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    _worker = Worker(load_task(folder.study.task), folder)


def _run(cell: Cell) -> bool:
    assert _worker is not None
    return _worker.run(cell)


def _end_with_parent() -> None:
    """A killed command must not leave workers behind, which would train what the next one trains too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def finished(cells: Sequence[Cell], folder: Folder) -> dict[Cell, Result]:
    """The results that are there."""
    return {cell: result for cell in cells if (result := folder.result(cell)) is not None}
