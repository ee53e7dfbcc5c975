"""Run the cells of a sweep or a study, several at once: finished, failed and resumed cells.

cells/NAME.json has the result of a cell, failed/NAME.json the reason of a failure. A cell of a sweep also has its run
folder cells/NAME, and logs/NAME.log with the output of its commands.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_eval import evaluator
from milora_eval.registry import choose
from milora_eval.scores.results import headline_of, read_results, require_lines
from milora_vl.common.atomic_write import locked, read_json, write_json, write_text
from milora_vl.common.errors import UserError
from milora_vl.common.evaluator_protocol import EvaluationRequest, QuestionSet
from milora_vl.sweep.cells import PICTURES, Cell, CellNumbers, recipe_of
from milora_vl.train.settings import Recipe


@dataclass(frozen=True, slots=True)
class CellFolder(ABC):
    """A folder with the cells of a sweep or a study. Finished cells stay finished: the same command resumes."""

    folder: Path

    @abstractmethod
    def result(self, cell: Cell) -> CellNumbers | None:
        """Return the numbers of a cell; None if it is not finished."""

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        return None if self.result(cell) else read_json(self.folder / "failed" / f"{cell.name}.json")

    def keep(self, cell: Cell, content: Mapping[str, Any]) -> None:
        write_json(self.folder / "cells" / f"{cell.name}.json", content)
        (self.folder / "failed" / f"{cell.name}.json").unlink(missing_ok=True)

    def keep_failure(self, cell: Cell, said: str, **more: Any) -> None:
        write_json(self.folder / "failed" / f"{cell.name}.json", {"said": said, **more})

    def to_run(self, cells: Sequence[Cell], *, retry: bool) -> list[Cell]:
        """Return the cells without a result; those that failed only with `retry`."""
        return [cell for cell in cells if not self.result(cell) and (retry or not self.failure(cell))]

    def time_left(self, cells: Sequence[Cell], left: int, jobs: int) -> str:
        """Return the expected time, from the finished cells; empty before the first."""
        seconds = [result["seconds"] for cell in cells if (result := self.result(cell))]
        if not seconds or not left:
            return ""
        each = statistics.median(seconds)
        return f", about {each / 60:.1f} minutes each, {each * -(-left // jobs) / 60:.0f} in all"

    def run(
        self,
        cells: Sequence[Cell],
        jobs: int,
        *,
        retry: bool,
        run: Callable[[Cell], bool],
        pool: Executor | None = None,
        on_done: Callable[[], object] = lambda: None,
    ) -> list[Cell]:
        """Run the cells that are to run, with `run` in the `pool` (None: here), and print a line for each.

        `run` returns whether the cell has a result; `on_done` is called after each cell. Returns the cells that failed.
        An interrupt, which the running cells receive too, cancels the others.
        Raises UserError if the system kills a process of the pool.
        """
        todo = self.to_run(cells, retry=retry)
        outcomes = ((cell, run(cell)) for cell in todo) if pool is None else _outcomes(pool, run, todo)
        try:
            for left, (cell, is_done) in zip(reversed(range(len(todo))), outcomes, strict=True):
                status = "done" if is_done else "FAILED" if self.failure(cell) else "stopped"
                sys.stderr.write(f"{status:<8}{cell.name}   {left:,} left{self.time_left(cells, left, jobs)}\n")
                on_done()
        finally:
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        failed = [cell for cell in cells if self.failure(cell)]
        for cell in failed:
            file = self.folder / "failed" / f"{cell.name}.json"
            sys.stderr.write(f"failed: {cell.name}   see {file}; try again with --retry\n")
        return failed


def _outcomes(pool: Executor, run: Callable[[Cell], bool], cells: Sequence[Cell]) -> Iterator[tuple[Cell, bool]]:
    futures = {pool.submit(run, cell): cell for cell in cells}
    try:
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    except BrokenProcessPool:
        message = "a worker was killed: if no user did this, memory ran out"
        hint = "finished cells are saved; run the same command again, with fewer --jobs to use less memory"
        raise UserError(message, hint=hint, exit_code=1) from None


@dataclass(frozen=True, slots=True)
class Sweep(CellFolder):
    """The folder of a sweep, and what its cells share: the recipe, and the questions that score them."""

    recipe: Recipe
    questions: QuestionSet

    def run_folder(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def results_folder(self, cell: Cell) -> Path:
        return self.run_folder(cell) / "eval" / choose(self.questions.suite).name / "final"

    def result(self, cell: Cell) -> CellNumbers | None:
        """Return the result of a cell; None if it is not finished, or if its answers have been deleted."""
        if not (self.results_folder(cell) / "predictions.jsonl").is_file():
            return None  # the paired tests need the answers
        return read_json(self.folder / "cells" / f"{cell.name}.json")

    def finished(self, seeds: Collection[int]) -> list[Cell]:
        """Return all cells in the folder with these seeds and a result, including cells of earlier commands."""
        results = [read_json(file) or {} for file in sorted((self.folder / "cells").glob("*.json"))]
        cells = [Cell(each["method"], each["learning_rate"], each["rank"], each["seed"]) for each in results]
        return [cell for cell in cells if cell.seed in seeds and self.result(cell)]

    def answers(self, cell: Cell) -> dict[str, tuple[float, Any, str]]:
        """Return the items of the benchmarks that score the cell: value, group and benchmark by the question's key."""
        folder = self.results_folder(cell)
        results, lines = read_results(folder), require_lines(folder)
        scored = headline_of(results).benchmarks
        names = {entry["reference"]: entry["name"] for entry in results["benchmarks"] if entry["name"] in scored}
        return {
            line["question_key"]: (float(line["correct"]), line["group"], names[line["benchmark"]])
            for line in lines
            if line["correct"] is not None and line["benchmark"] in names
        }

    def training(self, cell: Cell) -> list[str]:
        recipe, run = self.folder / "recipes" / f"{cell.name}.yaml", self.run_folder(cell)
        flags = ["--recipe", str(recipe), "--output_dir", str(run), "--resume_from_checkpoint", "auto"]
        return ["-m", "milora_vl.train", *flags]

    def evaluating(self, cell: Cell) -> list[str]:
        run = self.run_folder(cell)
        request = EvaluationRequest.of_run(run, self.recipe.model, self.questions, with_base=False)
        return ["-m", *evaluator.command(request)]


def run_sweep(
    sweep: Sweep, cells: Sequence[Cell], jobs: int, *, retry: bool, on_done: Callable[[], object] = lambda: None
) -> list[Cell]:
    """Run every cell without a result, `jobs` in parallel, and return those that failed."""
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()  # one for each parallel cell, which has its GPU
    for slot in range(jobs):
        slots.put(slot)

    def run(cell: Cell) -> bool:
        slot = slots.get()
        try:
            return _run_cell(sweep, cell, _environment(slot, jobs))
        finally:
            slots.put(slot)

    return sweep.run(cells, jobs, retry=retry, run=run, pool=ThreadPoolExecutor(jobs), on_done=on_done)


def _run_cell(sweep: Sweep, cell: Cell, environment: Mapping[str, str]) -> bool:
    """Train and evaluate a cell. Return whether it has a result."""
    recipe = recipe_of(sweep.recipe, cell)
    # Cells with the same method and rank share their initial factors through the cache.
    recipe = recipe.model_copy(update={"factor_cache": recipe.factor_cache or str(sweep.folder / "factors")})
    write_text(sweep.folder / "recipes" / f"{cell.name}.yaml", recipe.to_yaml())
    _wait_for_killed_sweep(sweep.run_folder(cell))
    start = time.monotonic()
    log = sweep.folder / "logs" / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        for make in (sweep.training, sweep.evaluating):
            command = make(cell)
            out.write(f"$ python {' '.join(command)}\n")
            out.flush()
            done = subprocess.run([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=environment)
            if done.returncode in (130, -signal.SIGINT):  # interrupted by the user: not a failure of the cell
                return False
            if done.returncode != 0:
                end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-6:]
                said = "\n".join([*end, _exit_reason(done.returncode)])
                sweep.keep_failure(cell, said, code=done.returncode)
                return False
    try:
        result = _collect(sweep, cell) | {"seconds": round(time.monotonic() - start, 1)}
    except (KeyError, IndexError, OSError, ValueError) as error:
        sweep.keep_failure(cell, f"{type(error).__name__}: {error}", code=0)
        return False
    sweep.keep(cell, result)
    return True


def _exit_reason(code: int) -> str:
    """Return why a failed command ended; a killed command cannot print a reason itself."""
    if code == -signal.SIGKILL:
        return "killed (SIGKILL): if no user did this, memory ran out; fewer --jobs need less memory"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _wait_for_killed_sweep(run: Path) -> None:
    """Wait while a training of a killed sweep still runs in this folder, and print a line."""
    said = False
    while run.exists():
        try:
            with locked(run):
                return
        except UserError as error:
            sys.stderr.write("" if said else f"waiting: {error}\n")
            said = True
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
    scored, forgetting = headline_of(results), results["forgetting"]
    policy = json.loads((run / "policy.json").read_text(encoding="utf-8"))
    shares = sorted({target["protect"] for target in policy.get("targets", ()) if target["rank"]}) or [0.0]
    return {
        "method": cell.method, "learning_rate": cell.learning_rate, "rank": cell.rank, "seed": cell.seed,
        "validation_loss": losses[kept], "benchmark": ", ".join(scored.benchmarks), "metric": scored.metric,
        "score": scored.value, "score_stderr": scored.stderr, "forgetting": forgetting["kl"],
        "forgetting_stderr": forgetting["kl_stderr"],
        **({PICTURES: forgetting["pictures"]["kl"]} if forgetting.get("pictures") else {}),
        "trainable": policy.get("trainable"),
        "protect": " to ".join(f"{share:g}" for share in dict.fromkeys((shares[0], shares[-1]))),
    }  # fmt: skip


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Return the environment of a cell: its share of the cores, and one GPU if there are several."""
    variables = {"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))}
    gpus = _visible_gpus()
    if len(gpus) > 1:
        variables["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return {**os.environ, **variables}


def usable_cores() -> int:
    """Return the number of cores that this process may use, which taskset or a container limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them: indices or UUIDs."""
    import torch

    count = torch.cuda.device_count()
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if inherited is None else inherited.split(",")
    return [name.strip() for name in names[:count]]
