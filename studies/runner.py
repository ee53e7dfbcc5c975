"""Run the cells of a study in worker processes (resumable); each process builds the task once.

cells/NAME.json holds the numbers of a cell and the scores of its test items, failed/NAME.json the reason of a failure.
Studies in the same folder share finished cells through the folder `shared`.
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

from milora_vl.common.atomic_write import read_json, write_json
from milora_vl.common.errors import UserError
from milora_vl.sweep.cells import Cell, CellNumbers
from milora_vl.sweep.runner import usable_cores
from studies.sequence import run_chain
from studies.study import Study
from studies.task import Task
from studies.tasks import load_task
from studies.train import run_cell

OnDone = Callable[[Cell, bool, int], None]


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of a study. A stored cell whose arm has changed since does not count as a result."""

    path: Path
    study: Study

    def result(self, cell: Cell) -> CellNumbers | None:
        """Return the numbers of a cell; None if it is not finished."""
        stored = self._read("cells", cell)
        return stored["result"] if stored else None

    def items(self, cell: Cell) -> dict[str, float]:
        """Return the score of each test item of a finished cell."""
        stored = self._read("cells", cell)
        return stored["items"] if stored else {}

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """Return the failure of a cell; None if it has a result or has not run."""
        return None if self.result(cell) else self._read("failed", cell)

    def finished(self) -> dict[Cell, CellNumbers]:
        """Return the results of the finished cells."""
        return {cell: result for cell in self.study.cells() if (result := self.result(cell)) is not None}

    def shared(self, cell: Cell) -> Path:
        """Return the file in which all studies share the result of this cell."""
        return self.path.parent / "shared" / f"{self.study.key(cell)}.json"

    def keep(self, cell: Cell, result: CellNumbers, items: dict[str, float]) -> None:
        """Store a finished cell."""
        self._write("cells", cell, {"result": result, "items": items})
        (self.path / "failed" / f"{cell.name}.json").unlink(missing_ok=True)

    def keep_failure(self, cell: Cell, said: str) -> None:
        """Store the reason why a cell failed."""
        self._write("failed", cell, {"said": said})

    def _read(self, kind: str, cell: Cell) -> dict[str, Any] | None:
        stored = read_json(self.path / kind / f"{cell.name}.json")
        return stored if stored and stored["key"] == self.study.key(cell) else None

    def _write(self, kind: str, cell: Cell, content: dict[str, Any]) -> None:
        write_json(self.path / kind / f"{cell.name}.json", {"key": self.study.key(cell), **content})


def run_study(folder: Folder, jobs: int, *, retry: bool, on_done: OnDone) -> None:
    """Run every cell without a result. Failed cells run only with `retry`."""
    todo = [cell for cell in folder.study.cells() if folder.result(cell) is None]
    todo = [cell for cell in todo if retry or folder.failure(cell) is None]
    for left, (cell, is_done) in enumerate(_run_all(folder, todo, jobs) if todo else (), start=1):
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
                "a worker was killed: if no user did this, memory ran out",
                hint=f"finished cells are saved; run the same command again, with --jobs {jobs - 1} to use less memory",
                exit_code=1,
            ) from None


@dataclass(frozen=True, slots=True)
class Worker:
    """One process, which builds the task once for all its cells."""

    task: Task
    folder: Folder

    def run(self, cell: Cell) -> bool:
        """Train and store one cell. Return False if it failed; the failure is stored and other cells continue."""
        try:
            shared = self.folder.shared(cell)
            known = read_json(shared)
            if known is None:
                run = run_chain if self.folder.study.then else run_cell
                result, items = run(self.task, self.folder.study, cell, self.folder.path.parent / "factors")
                write_json(shared, known := {"result": result, "items": items})
            self.folder.keep(cell, known["result"] | {"method": cell.method}, known["items"])
        except Exception:
            self.folder.keep_failure(cell, traceback.format_exc(limit=-6))
            return False
        return True


_worker: Worker | None = None  # set in each worker process


def _start(folder: Folder, jobs: int) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, usable_cores() // jobs))
    _worker = Worker(load_task(folder.study.task), folder)


def _run(cell: Cell) -> bool:
    assert _worker is not None
    return _worker.run(cell)


def _end_with_parent() -> None:
    """End this worker when its parent ends. Without this, a killed command leaves workers that train in parallel."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
