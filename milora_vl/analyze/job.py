"""An analysis from end to end: layer by layer into layers.jsonl, resumable; then tables, figures and a page."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

from milora_data.errors import UserError
from milora_data.whole import write_text
from milora_vl.adapters.folders import base_of, holds_adapter, holds_projector_alone, holds_residual
from milora_vl.analyze.changes import changes_of_model, read_changes
from milora_vl.analyze.rows import Row, base_row, update_row
from milora_vl.analyze.weights import Weights, open_weights
from milora_vl.load import load_model

FILE = "layers.jsonl"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to analyse: `kind` is base or update; `row` makes the row of one path."""

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
    device: torch.device,
    modules: str | None = None,
    allow_base_mismatch: bool = False,
) -> Plan:
    """Open what is to be analysed. UserError for what does not fit together."""
    folder = Path(subject)
    is_adapter = holds_adapter(folder) or holds_residual(folder)
    if is_adapter:
        base = base or _named_base(folder)
    if base is None:
        weights = open_weights(subject)
        paths = _chosen(weights.paths(), modules)
        key = _digest("base", subject, rank, modules, _stamps(folder))
        return Plan("base", subject, subject, paths, lambda path: base_row(path, weights, device, rank), key)
    weights = open_weights(base)
    if is_adapter:
        changes = read_changes(folder, weights, allow_base_mismatch=allow_base_mismatch)
    else:
        changes = changes_of_model(_tuned(subject, base), weights)
    if not changes:
        raise UserError(f"{subject} changes no matrix of {base}")
    key = _digest("update", subject, base, rank, modules, *_files(folder), *_stamps(Path(base)))
    return Plan(
        "update", subject, base, _chosen(list(changes), modules),
        lambda path: update_row(changes[path], weights, device, rank), key,
    )  # fmt: skip


def rows_of(todo: Plan, folder: Path) -> list[Row]:
    """Return a row for every path; what layers.jsonl has of the same analysis is not computed again.

    UserError where the folder holds another analysis.
    """
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    done = {row["path"]: row for row in _read(file, todo)}
    left = [path for path in todo.paths if path not in done]
    if done and left:
        sys.stderr.write(f"{len(done):,} of {len(todo.paths):,} layers are there already\n")
    with file.open("a", encoding="utf-8") as out, torch.inference_mode():
        if not done and file.stat().st_size == 0:
            out.write(json.dumps({"analysis": todo.key, "of": todo.name, "base": todo.base}) + "\n")
        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file need not hold every layer
        for path in tqdm(left, desc="layers", unit="layer", disable=not left, mininterval=interval):
            start = time.perf_counter()
            row = todo.row(path)
            row["seconds"] = round(time.perf_counter() - start, 3)
            out.write(json.dumps(row) + "\n")
            out.flush()
            done[path] = row
    return [done[path] for path in todo.paths]


def _read(file: Path, todo: Plan) -> Iterator[Row]:
    """The rows that an earlier, interrupted run left; a line that was cut off is dropped from the file."""
    if not file.is_file():
        return
    whole = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        with suppress(ValueError):
            whole.append(json.loads(line))
    if whole and whole[0].get("analysis") != todo.key:
        raise UserError(
            f"{file.parent} holds another analysis, of {whole[0].get('of')}; nothing is overwritten\n"
            "say:  --output_dir ANOTHER"
        )
    write_text(file, "".join(json.dumps(line) + "\n" for line in whole))
    yield from whole[1:]


def _named_base(folder: Path) -> str:
    """The base that an adapter names, or the adapter in a residual base."""
    try:
        return base_of(folder if holds_adapter(folder) else next(folder.glob("*/adapter_config.json")).parent)
    except UserError as error:
        raise UserError(f"{str(error).partition(chr(10))[0]}\nsay:  --base NAME-OR-FOLDER") from None


def _chosen(paths: list[str], pattern: str | None) -> list[str]:
    found = [path for path in paths if pattern is None or fnmatch(path, pattern)]
    if not found:
        raise UserError(f"--modules {pattern}: no layer matches\nthere are {len(paths):,}, such as {paths[0]}")
    return found


def _tuned(subject: str, base: str) -> Weights:
    """A fully tuned model; a projector trained alone, on its base."""

    if holds_projector_alone(Path(subject)):
        return Weights.of(load_model(base, adapter=subject)[0], subject)
    return open_weights(subject)


def _files(folder: Path) -> list[tuple[str, str]]:
    """The files of what was trained, by content: a longer training or another scale (config) is another analysis."""
    names = ("*.safetensors", "*.bin", "*/adapter_model.*", "adapter_config.json", "*/adapter_config.json")
    found = (file for name in names for file in folder.glob(name))
    digests = []
    for file in sorted(found):
        content = hashlib.sha256()
        with file.open("rb") as opened:
            for chunk in iter(lambda: opened.read(1 << 20), b""):
                content.update(chunk)
        digests.append((file.name, content.hexdigest()))
    return digests


def _stamps(folder: Path) -> list[tuple[str, int, int]]:
    """Size and time of a model's files: of a whole model hashing takes too long."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
