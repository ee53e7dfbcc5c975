"""Names of benchmarks and suites. Benchmarks are imported when used; `module:Class` names one outside this table."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from milora_data.command import suggest
from milora_data.errors import UserError
from milora_eval.benchmark import Benchmark

BENCHMARKS: dict[str, str] = {
    "emoji": "milora_eval.emoji:Emoji",
}


@dataclass(frozen=True, slots=True)
class Suite:
    """Benchmarks under one name; with `limit`, that many items of each. `partial`: only those whose files are there."""

    benchmarks: tuple[str, ...]
    about: str
    limit: int | None = None
    partial: bool = False


SUITES: dict[str, Suite] = {
    "emoji": Suite(("emoji",), "the demo's held-out emoji, eight question types"),
    "quick": Suite(
        tuple(BENCHMARKS), "200 items each of the benchmarks whose files are there", limit=200, partial=True
    ),
}


def find_suite(name: str) -> Suite:
    """Return a suite; UserError with the names there are."""
    if name not in SUITES:
        raise UserError(_unknown("suite", name, SUITES))
    return SUITES[name]


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name in BENCHMARKS, or by `module:Class`; UserError with the names there are."""
    place = BENCHMARKS.get(name, name)
    module, _, attribute = place.partition(":")
    if not attribute:
        raise UserError(_unknown("benchmark", name, BENCHMARKS))
    try:
        made: Benchmark = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise UserError(f'cannot import the benchmark "{place}": {error}\nexpected: module:Class') from None
    return made


def reference(benchmark: Benchmark) -> str:
    """Return what `find_benchmark` finds this benchmark by: its name in the table, or `module:Class`."""
    place = f"{type(benchmark).__module__}:{type(benchmark).__qualname__}"
    return benchmark.name if BENCHMARKS.get(benchmark.name) == place else place


def folder_of(benchmark: Benchmark, data_dir: Path) -> Path:
    """Return where a benchmark's files are: the folder of its name in the data folder, or else the data folder."""
    own = data_dir / benchmark.name
    return own if own.is_dir() else data_dir


def has_files(benchmark: Benchmark, data_dir: Path) -> bool:
    """Tell whether everything that the benchmark reads is there."""
    return all((folder_of(benchmark, data_dir) / name).exists() for name in benchmark.files)


def _unknown(what: str, name: str, known: dict[str, str] | dict[str, Suite]) -> str:
    near = suggest(name, known)
    hint = f"\ndid you mean {near[0]} ?" if near else ""
    return f'unknown {what} "{name}"; expected one of: {", ".join(known)}{hint}\nsee: python -m milora_eval ls'
