"""Run an analysis: write one row per layer to layers.jsonl, and resume an interrupted one."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch

from milora_vl.analyze.changes import changes_of_model, read_changes
from milora_vl.analyze.rows import Row, base_row, update_row
from milora_vl.analyze.weights import Weights, open_weights
from milora_vl.common.atomic_write import write_text
from milora_vl.common.errors import UserError
from milora_vl.common.progress import progress_bar
from milora_vl.core.adapter.folders import (
    CONFIG,
    adapters_inside,
    base_of,
    holds_adapter,
    holds_projector_alone,
    holds_residual,
)
from milora_vl.interop.load_model import load_model
from milora_vl.models.devices import device_named

FILE = "layers.jsonl"


@dataclass(frozen=True, slots=True)
class AnalysisPlan:
    """What to analyse: `kind` is base or update; `row` computes the row of one path."""

    kind: str
    name: str
    base: str
    paths: list[str]
    row: Callable[[str], Row]
    key: str


def plan(
    subject: str,
    base: str | None,
    *,
    rank: int,
    device: str | None = None,
    modules: str | None = None,
    allow_base_mismatch: bool = False,
) -> AnalysisPlan:
    """Open the weights to analyse; `device` is the value of --device.

    Raises UserError if subject and base model do not fit.
    """
    folder, place = Path(subject), device_named(device)
    is_adapter = holds_adapter(folder) or holds_residual(folder)
    if is_adapter:
        base = base or _named_base(folder)
    if base is None:
        weights = open_weights(subject)
        paths = _chosen(weights.paths(), modules)
        key = _digest("base", subject, rank, modules, _stamps(folder))
        return AnalysisPlan("base", subject, subject, paths, lambda path: base_row(path, weights, place, rank), key)
    weights = open_weights(base)
    if is_adapter:
        changes = read_changes(folder, weights, allow_base_mismatch=allow_base_mismatch)
    else:
        changes = changes_of_model(_tuned(subject, base), weights)
    if not changes:
        raise UserError(
            f"changes no matrix of {base}",
            code="analysis-no-change",
            where=subject,
            hint="check --base: it should be the model before the training",
        )
    key = _digest("update", subject, base, rank, modules, _stamps(folder), _stamps(Path(base)))
    return AnalysisPlan(
        "update", subject, base, _chosen(list(changes), modules),
        lambda path: update_row(changes[path], weights, place, rank), key,
    )  # fmt: skip


def rows_of(todo: AnalysisPlan, folder: Path) -> list[Row]:
    """Return a row for every path. Rows that layers.jsonl has from the same analysis are reused.

    Raises UserError if the folder contains another analysis.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    done = {row["path"]: row for row in _read(file, todo)}
    remaining = [path for path in todo.paths if path not in done]
    if done and remaining:
        sys.stderr.write(f"{len(done):,} of {len(todo.paths):,} layers are already analysed\n")
    bar = progress_bar("analysing", len(remaining), "layers", is_shown=bool(remaining))
    with file.open("a", encoding="utf-8") as out, torch.inference_mode(), bar:
        if not done and file.stat().st_size == 0:
            out.write(json.dumps({"analysis": todo.key, "of": todo.name, "base": todo.base}) + "\n")
        for path in remaining:
            start = time.perf_counter()
            row = todo.row(path)
            row["seconds"] = round(time.perf_counter() - start, 3)
            out.write(json.dumps(row) + "\n")
            out.flush()
            done[path] = row
            bar.update()
    return [done[path] for path in todo.paths]


def _read(file: Path, todo: AnalysisPlan) -> Iterator[Row]:
    """Yield the rows of an earlier, interrupted run, and remove an incomplete last line from the file."""
    if not file.is_file():
        return
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        with suppress(ValueError):
            entries.append(json.loads(line))
    if entries and entries[0].get("analysis") != todo.key:
        raise UserError(
            f"contains another analysis, of {entries[0].get('of')}; it is not overwritten",
            code="output-exists",
            where=str(file.parent),
            hint="use:  --output_dir ANOTHER",
        )
    write_text(file, "".join(json.dumps(line) + "\n" for line in entries))
    yield from entries[1:]


def _named_base(folder: Path) -> str:
    """Return the base model that an adapter names, or the adapter inside a residual base."""
    try:
        return base_of(folder if holds_adapter(folder) else adapters_inside(folder)[0])
    except UserError as error:
        problems = [replace(problem, hint="add:  --base NAME-OR-FOLDER") for problem in error.problems]
        raise UserError(problems=problems) from None


def _chosen(paths: list[str], pattern: str | None) -> list[str]:
    matching = [path for path in paths if pattern is None or fnmatch(path, pattern)]
    if not matching:
        raise UserError(
            f"no layer matches {pattern}",
            code="analysis-no-match",
            where="--modules",
            hint=f"there are {len(paths):,} layers, for example {paths[0]}",
        )
    return matching


def _tuned(subject: str, base: str) -> Weights:
    """Open a fully tuned model, or a base model with the trained projector."""
    if holds_projector_alone(Path(subject)):
        return Weights.of(load_model(base, adapter=subject)[0], subject)
    return open_weights(subject)


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of the files of a model or training. Another training or scale changes them."""
    names = ("*.safetensors", "*.bin", "*/adapter_model.*", CONFIG, f"*/{CONFIG}")
    files = sorted(file for name in names for file in folder.glob(name))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
