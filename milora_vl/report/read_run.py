"""Read a run folder for its report: logs, policy, scores, forgetting. Any file may be missing.

Metrics and answers are the entries of `results.json` and `predictions.jsonl`, as the evaluator stored them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from milora_data.keys import file_key
from milora_vl.common.atomic_write import json_lines
from milora_vl.common.errors import UserError
from milora_vl.common.evaluator_protocol import evaluator
from milora_vl.core.adapter.folders import ADAPTER_FILES, HELD_OUT

Json = Mapping[str, Any]
RESTORE = "restore the files of the run, or move the damaged one away for a report without it"
_KNOWN = ("recipe.yaml", "environment.json", "policy.json", "trainer_state.json", "eval")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The files of one evaluation of one model: `which` is base, final or checkpoint-N."""

    which: str
    results: Json
    answers: tuple[Json, ...]

    def metrics(self) -> Iterator[tuple[Json, Json]]:
        """Yield (benchmark, metric) of the stored scores; the first of a benchmark is its headline."""
        for benchmark in self.results.get("benchmarks", ()):
            yield from ((benchmark, metric) for metric in benchmark["metrics"] if not metric.get("detail"))

    def of(self, benchmark: Json) -> list[Json]:
        reference = benchmark.get("reference", benchmark["name"])
        return [line for line in self.answers if line.get("benchmark") == reference]


@dataclass(frozen=True, slots=True)
class Score:
    """A stored metric of a benchmark before and after training; either may be missing."""

    benchmark: str
    before: Json | None
    after: Json | None

    @property
    def any(self) -> Json:
        """Either metric, for fields that are equal in both (name, unit, baseline, note)."""
        metric = self.after or self.before
        assert metric is not None
        return metric


@dataclass(frozen=True, slots=True)
class SuiteScores:
    """The evaluations of a suite before and after training."""

    suite: str
    before: Evaluation | None
    after: Evaluation | None

    @property
    def paired(self) -> dict[str, Json]:
        """The stored comparison of the two by the name of the benchmark, each over the questions that both answer."""
        stored = self.after.results.get("comparison") if self.before and self.after else None
        return {entry["benchmark"]: entry for entry in (stored or {}).get("benchmarks", ())}

    def scores(self) -> list[Score]:
        """Return the compared metrics, then the metrics of benchmarks that one model alone has answered."""
        paired, known = self.paired, set(self.paired)
        pairs = [(name, pair) for name, entry in paired.items() for pair in entry["pairs"] if not pair["b"]["detail"]]
        order = {name: number for number, name in enumerate(paired)}
        pairs.sort(key=lambda pair: (order[pair[0]], pair[1]["b"]["name"] != paired[pair[0]]["headline"]))
        found = [Score(name, pair["a"], pair["b"]) for name, pair in pairs]
        for which, side in (("after", self.after), ("before", self.before)):
            own = [(entry["name"], metric) for entry, metric in (side.metrics() if side else ())]
            empty: dict[str, Json | None] = {"before": None, "after": None}
            found += [Score(name, **{**empty, which: metric}) for name, metric in own if name not in known]
            known.update(name for name, _ in own)
        return found


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The content of a run folder; `earlier` has scores of the runs that it came after."""

    folder: Path
    recipe: Json = field(default_factory=dict)
    environment: Json = field(default_factory=dict)
    policy: Json = field(default_factory=dict)
    history: tuple[Json, ...] = ()
    comparisons: tuple[SuiteScores, ...] = ()
    forgetting: Json = field(default_factory=dict)
    scales: Json = field(default_factory=dict)  # of `export --scale auto`
    earlier: tuple[tuple[Path, Score], ...] = ()
    held_out: tuple[Json, ...] = ()  # the records with the highest loss, highest first

    def headline(self) -> tuple[SuiteScores, Score] | None:
        """Return the score to show first: of questions new to this run, else the one with the largest gain."""
        gains = {
            score.benchmark: score.after["value"] - score.before["value"]
            for _, score in reversed(self.earlier)
            if score.before and score.after  # else it has no question of this run
        }
        found = [(comparison, score) for comparison in self.comparisons for score in comparison.scores()]
        return min(found, key=lambda f: (f[1].after is None, -gains.get(f[1].benchmark, math.inf)), default=None)

    @property
    def gain(self) -> Json | None:
        """The gain of the headline's benchmark over its base or the most frequent answer, as stored."""
        found = self.headline()
        return found[0].paired.get(found[1].benchmark, {}).get("gain") if found else None


def label(name: str) -> str:
    """Return the display name of a metric or question type.

    >>> label("multi_turn"), label("yes_no")
    ('multi turn', 'yes/no')
    """
    return name.replace("yes_no", "yes/no").replace("_", " ")


def in_units(metric: Json, value: float) -> float:
    """Return a value of a stored metric as people read it: fractions in percent, points unchanged."""
    return 100 * value if is_fraction(metric) else value


def is_fraction(metric: Json) -> bool:
    return bool(metric.get("unit", "fraction") == "fraction")


def read_run(folder: Path) -> RunFiles:
    if not any((folder / name).exists() for name in _KNOWN):
        found = "contains no file of a run" if folder.is_dir() else "is not a folder"
        hint = (
            f"expected the output_dir of a training, with {', '.join(_KNOWN[:4])}, ...\n"
            "make one:  python -m milora_vl.train --recipe smol-llava-demo --output_dir runs/demo"
        )
        raise UserError(found if folder.exists() else "no such folder", where=str(folder), hint=hint)
    comparisons = tuple(_comparisons(folder / "eval"))
    return RunFiles(
        folder=folder,
        recipe=_read(folder / "recipe.yaml", {}) or {},
        environment=_read(folder / "environment.json", {}),
        policy=_read(folder / "policy.json", {}),
        history=tuple(_read(folder / "trainer_state.json", {}).get("log_history", ())),
        comparisons=comparisons,
        forgetting=_read(folder / "forgetting.json", {}),
        scales=_scales(folder),
        earlier=tuple(_earlier(folder, comparisons)),
        held_out=tuple(line for line in json_lines(folder / HELD_OUT) if "reply" in line),
    )


def _scales(folder: Path) -> Json:
    found: Json = _read(folder / "scales.json", {})
    return found if found.get("adapter") == file_key(folder / ADAPTER_FILES[0]) else {}


def tasks_of(folder: Path) -> list[Json]:
    """Return the tasks whose updates a run with `--after` holds, in order, its own last, as in its milora.json."""
    return list(_read(folder / "milora.json", {}).get("tasks", ()))


def _comparisons(folder: Path) -> Iterator[SuiteScores]:
    """Yield one comparison per suite: the base model with the final model, or else with its latest checkpoint."""
    for suite in sorted({file.parent.parent for file in folder.glob("**/*/results.json")}):
        folders = {path.parent.name: path.parent for path in suite.glob("*/results.json")}
        steps = sorted((name for name in folders if name.startswith("checkpoint-")), key=_step)
        latest = "final" if "final" in folders else (steps[-1] if steps else None)
        before = _evaluation(folders["base"]) if "base" in folders else None
        after = _evaluation(folders[latest]) if latest else None
        if before or after:
            yield SuiteScores(suite.relative_to(folder).as_posix(), before, after)


def _step(name: str) -> int:
    digits = name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1


def _evaluation(folder: Path) -> Evaluation:
    return Evaluation(folder.name, _read(folder / "results.json", {}), tuple(json_lines(folder / "predictions.jsonl")))


def _earlier(folder: Path, comparisons: Sequence[SuiteScores]) -> Iterator[tuple[Path, Score]]:
    """Yield the scores that earlier runs had, and this run's on the same questions; the first run of each set alone."""
    known = set[Any]()
    answers = [line for each in comparisons if each.after for line in each.after.answers]
    for run in [Path(task["run"]) for task in tasks_of(folder)[:-1]]:
        for after in (comparison.after for comparison in _comparisons(run / "eval")):
            for benchmark in after.results.get("benchmarks", ()) if after and after.which == "final" else ():
                assert after is not None
                own = after.of(benchmark)
                asked = frozenset(line["question_key"] for line in own)
                if benchmark["metrics"] and asked not in known:
                    known.add(asked)
                    name = {"benchmark": benchmark.get("reference", benchmark["name"])}
                    yield run, _since(benchmark, own, [{**a, **name} for a in answers if a["question_key"] in asked])


def _since(benchmark: Json, before: Sequence[Json], now: Sequence[Json]) -> Score:
    """Return the headline of a benchmark then and now, over the questions of both; without one, the old headline."""
    try:
        [entry] = evaluator().compare(before, now)
        return Score(benchmark["name"], entry["pairs"][0]["a"], entry["pairs"][0]["b"])
    except (ValueError, LookupError):  # no question in common, or a benchmark of the user whose code is not imported
        return Score(benchmark["name"], benchmark["metrics"][0], None)


def _read(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    text = path.read_text(encoding="utf-8")
    try:
        return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot be parsed: {error}", where=str(path), hint=RESTORE) from error
