"""Run the cells of a study in worker processes, with the runner of a sweep; each process builds the task once.

cells/NAME.json holds the numbers of a cell and the scores of its test items. Studies in the same folder share finished
cells through the folder `shared`.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from milora_vl.common.atomic_write import read_json, write_json
from milora_vl.sweep.cells import Cell, CellNumbers
from milora_vl.sweep.runner import CellFolder, usable_cores
from studies.sequence import run_chain
from studies.study import Study
from studies.tasks import load_task
from studies.train import run_cell


@dataclass(frozen=True, slots=True)
class Folder(CellFolder):
    """The folder of a study. A stored cell whose arm has changed since does not count as a result."""

    study: Study

    def result(self, cell: Cell) -> CellNumbers | None:
        stored = self._stored("cells", cell)
        return stored["result"] if stored else None

    def items(self, cell: Cell) -> dict[str, float]:
        """Return the score of each test item of a finished cell."""
        stored = self._stored("cells", cell)
        return stored["items"] if stored else {}

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        return None if self.result(cell) else self._stored("failed", cell)

    def finished(self) -> dict[Cell, CellNumbers]:
        """Return the results of the finished cells."""
        return {cell: result for cell in self.study.cells() if (result := self.result(cell)) is not None}

    def shared(self, cell: Cell) -> Path:
        """Return the file in which all studies share the result of this cell."""
        return self.folder.parent / "shared" / f"{self.study.key(cell)}.json"

    def _stored(self, kind: str, cell: Cell) -> dict[str, Any] | None:
        stored = read_json(self.folder / kind / f"{cell.name}.json")
        return stored if stored and stored["key"] == self.study.key(cell) else None


def run_study(folder: Folder, jobs: int, *, retry: bool) -> list[Cell]:
    """Run every cell without a result, in `jobs` processes, and return those that failed."""
    cells = folder.study.cells()
    if jobs == 1 or not folder.to_run(cells, retry=retry):
        return folder.run(cells, jobs, retry=retry, run=partial(run_cell_of, folder))
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, (jobs,))
    return folder.run(cells, jobs, retry=retry, run=partial(run_cell_of, folder), pool=pool)


def run_cell_of(folder: Folder, cell: Cell) -> bool:
    """Train and store one cell. Return False if it failed; the failure is stored and other cells continue."""
    shared, study, key = folder.shared(cell), folder.study, folder.study.key(cell)
    try:
        known = read_json(shared)
        if known is None:
            run = run_chain if study.then else run_cell
            result, items = run(load_task(study.task), study, cell, folder.folder.parent / "factors")
            write_json(shared, known := {"result": result, "items": items})
        folder.keep(cell, {"key": key, "result": known["result"] | {"method": cell.method}, "items": known["items"]})
    except Exception:
        folder.keep_failure(cell, traceback.format_exc(limit=-6), key=key)
        return False
    return True


def _start(jobs: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, usable_cores() // jobs))


def _end_with_parent() -> None:
    """End this worker when its parent ends. Without this, a killed command leaves workers that train in parallel."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
