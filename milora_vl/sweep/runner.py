"""Run the cells of a sweep, several in parallel (`--jobs`), each in its own folder; failed and resumed cells.

cells/NAME is the run folder, logs/NAME.log the output of its commands, cells/NAME.json its result, failed/NAME.json the
reason of a failure.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from milora_eval import evaluator
from milora_eval.scores.results import require_lines
from milora_eval.suites import results_name
from milora_vl.common.atomic_write import read_json, write_json, write_text
from milora_vl.common.errors import UserError
from milora_vl.common.evaluator import EvaluationRequest, QuestionSet
from milora_vl.sweep.cells import Cell, CellNumbers, recipe_of
from milora_vl.train.folder import locked
from milora_vl.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Sweep:
    """The folder of a sweep, and what its cells share: the recipe, and the questions that score them."""

    folder: Path
    recipe: Recipe
    questions: QuestionSet

    def run_folder(self, cell: Cell) -> Path:
        """Return the run folder of a cell."""
        return self.folder / "cells" / cell.name

    def results_folder(self, cell: Cell) -> Path:
        """Return the folder with the answers of a cell."""
        return self.run_folder(cell) / "eval" / results_name(self.questions.suite) / "final"

    def result(self, cell: Cell) -> CellNumbers | None:
        """Return the result of a cell; None if it is not finished, or if its answers have been deleted."""
        if not (self.results_folder(cell) / "predictions.jsonl").is_file():
            return None  # the paired tests need the answers
        return read_json(self.folder / "cells" / f"{cell.name}.json")

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """Return the failure of a cell; None if it has a result or has not run."""
        return None if self.result(cell) else read_json(self.folder / "failed" / f"{cell.name}.json")

    def finished(self, seeds: Collection[int]) -> list[Cell]:
        """Return all cells in the folder with these seeds and a result, including cells of earlier commands."""
        results = [read_json(file) or {} for file in sorted((self.folder / "cells").glob("*.json"))]
        cells = [Cell(each["method"], each["learning_rate"], each["rank"], each["seed"]) for each in results]
        return [cell for cell in cells if cell.seed in seeds and self.result(cell)]

    def answers(self, cell: Cell) -> dict[str, tuple[float, Any]]:
        """Return the answers of a finished cell to the first benchmark of the suite: id -> (score, picture)."""
        lines = require_lines(self.results_folder(cell))
        of_first = (line for line in lines if line["benchmark"] == lines[0]["benchmark"])
        return {line["id"]: (float(line["correct"]), line["group"]) for line in of_first if line["correct"] is not None}

    def training(self, cell: Cell) -> list[str]:
        """Return the command that trains a cell, without the interpreter."""
        file, run = self.folder / "recipes" / f"{cell.name}.yaml", self.run_folder(cell)
        words = ["--recipe", str(file), "--output_dir", str(run), "--resume_from_checkpoint", "auto"]
        return ["-m", "milora_vl.train", *words]

    def evaluating(self, cell: Cell) -> list[str]:
        """Return the command that evaluates a trained cell."""
        run = self.run_folder(cell)
        request = EvaluationRequest.of_run(run, self.recipe.model, self.questions, with_base=False)
        return ["-m", *evaluator.command(request)]


def run_cells(
    sweep: Sweep, cells: Sequence[Cell], jobs: int, *, retry: bool, on_done: Callable[[Cell, bool, int], None]
) -> None:
    """Run every cell without a result, `jobs` in parallel; failed cells only with `retry`.

    Calls `on_done(cell, whether it has a result, number left)` when a cell ends. A keyboard interrupt stops all cells.
    """
    todo = [c for c in cells if sweep.result(c) is None and (retry or sweep.failure(c) is None)]
    slots = list(range(jobs))
    guard, stopped = threading.Lock(), threading.Event()

    def run(cell: Cell) -> bool:
        if stopped.is_set():
            return False
        with guard:
            slot = slots.pop()
        try:
            return _run_cell(sweep, cell, _environment(slot, jobs))
        finally:
            with guard:
                slots.append(slot)

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, cell): cell for cell in todo}
        try:
            for left, future in enumerate(as_completed(futures), start=1):
                on_done(futures[future], future.result(), len(todo) - left)
        except KeyboardInterrupt:  # the commands receive the signal too
            stopped.set()
            raise


def _run_cell(sweep: Sweep, cell: Cell, environment: Mapping[str, str]) -> bool:
    for name in ("cells", "logs", "failed", "recipes"):
        (sweep.folder / name).mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(sweep.recipe, cell)
    # Cells with the same method and rank share their initial factors through the cache.
    shared = recipe.factor_cache or str(sweep.folder / "factors")
    recipe = recipe.model_copy(update={"factor_cache": shared})
    write_text(sweep.folder / "recipes" / f"{cell.name}.yaml", recipe.to_yaml())
    _wait_for_killed_sweep(sweep.run_folder(cell))
    start = time.monotonic()
    log = sweep.folder / "logs" / f"{cell.name}.log"
    with log.open("a", encoding="utf-8") as out:
        for make in (sweep.training, sweep.evaluating):
            command = make(cell)
            out.write(f"$ python {' '.join(command)}\n")
            out.flush()
            done = subprocess.run([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=environment)
            if done.returncode == 130 or done.returncode == -2:  # interrupted by the user: not a failure of the cell
                return False
            if done.returncode != 0:
                output = f"{_tail(log)}\n{_exit_reason(done.returncode)}"
                failure = {"command": command, "code": done.returncode, "log": str(log), "said": output}
                write_json(sweep.folder / "failed" / f"{cell.name}.json", failure)
                return False
    try:
        result = _collect(sweep, cell) | {"seconds": round(time.monotonic() - start, 1)}
    except (KeyError, IndexError, OSError, ValueError) as error:
        failure = {"command": [], "code": 0, "log": str(log), "said": f"{type(error).__name__}: {error}"}
        write_json(sweep.folder / "failed" / f"{cell.name}.json", failure)
        return False
    write_json(sweep.folder / "cells" / f"{cell.name}.json", result)
    (sweep.folder / "failed" / f"{cell.name}.json").unlink(missing_ok=True)
    return True


def _wait_for_killed_sweep(run: Path) -> None:
    """Wait while a training of a killed sweep still runs in this folder."""
    while run.exists():
        try:
            with locked(run):
                return
        except UserError:
            time.sleep(1)


def _collect(sweep: Sweep, cell: Cell) -> dict[str, Any]:
    """Return the numbers of a finished cell: validation loss, headline score, forgetting.

    Raises ValueError if the training logged no evaluation loss, KeyError or OSError if a file or number is missing.
    """
    run = sweep.run_folder(cell)
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    if not losses:
        raise ValueError("the training logged no evaluation loss: eval_steps is larger than its number of steps")
    best = state["best_model_checkpoint"] if recipe_of(sweep.recipe, cell).train.get("load_best_model_at_end") else None
    kept = int(best.rpartition("-")[2]) if best else max(losses)  # the step whose weights are evaluated
    results = json.loads((sweep.results_folder(cell) / "results.json").read_text(encoding="utf-8"))
    metric = results["benchmarks"][0]["metrics"][0]
    forgetting = results["forgetting"]
    policy = json.loads((run / "policy.json").read_text(encoding="utf-8"))
    shares = sorted({target["protect"] for target in policy.get("targets", ()) if target["rank"]}) or [0.0]
    return {
        "method": cell.method, "learning_rate": cell.learning_rate, "rank": cell.rank, "seed": cell.seed,
        "validation_loss": losses[kept], "benchmark": results["benchmarks"][0]["name"], "metric": metric["name"],
        "score": metric["value"], "score_stderr": metric.get("stderr"), "forgetting": forgetting["kl"],
        "forgetting_stderr": forgetting["kl_stderr"], "trainable": policy.get("trainable"),
        "protect": " to ".join(f"{share:g}" for share in dict.fromkeys((shares[0], shares[-1]))),
    }  # fmt: skip


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Return the environment of a cell: its share of the cores, and one GPU if there are several."""
    import torch

    variables = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    if torch.cuda.device_count() > 1:
        variables["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
    return {**os.environ, **variables}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder against a second sweep. Raises UserError if a sweep is running in it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another sweep is running in {folder}",
            code="sweep-already-running",
            where="--output_dir",
            hint="wait until it has finished, or use another folder",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _exit_reason(code: int) -> str:
    """Return why a failed command ended; a killed command cannot print a reason itself."""
    if code == -signal.SIGKILL:
        return "killed (SIGKILL): if no user did this, memory ran out; fewer --jobs need less memory"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-6:])
