"""Read a run folder for its report: logs, policy, spectra, scores, forgetting. Any file may be missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from milora_vl.common.errors import UserError
from milora_vl.common.evaluator import Gain, evaluator
from milora_vl.common.yaml_text import parse_yaml

Json = Mapping[str, Any]
RESTORE = "restore the files of the run, or move the damaged one away for a report without it"
_KNOWN = ("recipe.yaml", "environment.json", "policy.json", "trainer_state.json", "spectrum.json", "eval")


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a benchmark. Fractions are shown as percent, points unchanged."""

    name: str
    value: float
    stderr: float | None = None
    n: int = 0
    baseline: float | None = None
    higher_is_better: bool = True
    note: str | None = None
    unit: Literal["fraction", "points"] = "fraction"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of one model: `which` is base, final or checkpoint-N; `metrics` holds (benchmark, metric)."""

    suite: str
    which: str
    results: Json
    metrics: tuple[tuple[str, Metric], ...]
    predictions: tuple[Json, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """One metric before and after training; either may be missing. The first of a benchmark is its headline."""

    benchmark: str
    name: str
    before: Metric | None
    after: Metric | None
    is_headline: bool

    @property
    def label(self) -> str:
        """Return the display name."""
        return label(self.name)

    @property
    def any(self) -> Metric:
        """Return either metric, for fields that are equal in both (unit, baseline, note)."""
        metric = self.after or self.before
        assert metric is not None
        return metric

    @property
    def gain(self) -> float | None:
        """Return after minus before."""
        return self.after.value - self.before.value if self.after and self.before else None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The evaluations of a suite before and after training."""

    suite: str
    before: Evaluation | None
    after: Evaluation | None
    scores: tuple[Score, ...]
    gain: Gain | None = None  # of the first score


@dataclass(frozen=True, slots=True)
class EarlierScore:
    """The headline of a benchmark that an earlier run was evaluated on: after that run, and after this one."""

    run: Path
    score: Score


@dataclass(frozen=True, slots=True)
class Layer:
    """One entry of spectrum.json."""

    path: str
    tower: str
    shape: tuple[int, ...]
    sigma: tuple[float, ...]
    trained: tuple[int, int] | None
    method: str
    note: str | None

    @property
    def leaf(self) -> str:
        """Return the last part of the path."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def energy(self) -> float | None:
        """Return the share of the trained band in the squared Frobenius norm."""
        total = sum(s * s for s in self.sigma)
        return sum(s * s for s in self.sigma[slice(*self.trained)]) / total if self.trained and total else None

    @property
    def status(self) -> str:
        """Return a short text about what trains in this layer."""
        if self.trained is None:
            return self.method
        low, high, count = *self.trained, min(self.shape)
        return f"{'last' if high == count else 'first'} {high - low} of {count} train"


@dataclass(frozen=True, slots=True)
class Run:
    """The content of a run folder."""

    folder: Path
    recipe: Json = field(default_factory=dict)
    environment: Json = field(default_factory=dict)
    policy: Json = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()
    history: tuple[Json, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    forgetting: Json = field(default_factory=dict)
    earlier: tuple[EarlierScore, ...] = ()

    @property
    def bands(self) -> list[Layer]:
        """Return the layers of which a band of singular components trains, and not all."""
        return [each for each in self.layers if each.sigma and each.trained and each.trained != (0, len(each.sigma))]


def label(name: str) -> str:
    """Return the display name of a metric or question type.

    >>> label("multi_turn"), label("yes_no")
    ('multi turn', 'yes/no')
    """
    return name.replace("yes_no", "yes/no").replace("_", " ")


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError if it is not a run folder or if a file cannot be parsed."""
    if not any((folder / name).exists() for name in _KNOWN):
        what = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(
            "contains no file of a run" if folder.is_dir() else what,
            code="run-folder-missing",
            where=str(folder),
            hint=f"expected the output_dir of a training, with {', '.join(_KNOWN[:4])}, ...\n"
            "make one:  python -m milora_vl.train --recipe smol-llava-demo --output_dir runs/demo",
        )
    comparisons = tuple(_comparisons(folder / "eval"))
    return Run(
        folder=folder,
        recipe=_yaml(folder / "recipe.yaml"),
        environment=_json(folder / "environment.json", {}),
        policy=_json(folder / "policy.json", {}),
        layers=tuple(map(_layer, _json(folder / "spectrum.json", []))),
        history=tuple(_json(folder / "trainer_state.json", {}).get("log_history", ())),
        comparisons=comparisons,
        forgetting=_json(folder / "forgetting.json", {}),
        earlier=tuple(_earlier(folder, comparisons)),
    )


def tasks_of(folder: Path) -> list[Json]:
    """Return the tasks whose updates a run with `--after` holds, in order, its own last, as in its milora.json."""
    return list(_json(folder / "milora.json", {}).get("tasks", ()))


def _earlier(folder: Path, comparisons: Sequence[Comparison]) -> Iterator[EarlierScore]:
    """Yield the scores that earlier runs had, and this run's on the same questions; the first run of each set alone."""
    now = {asked: metric for each in comparisons if each.after for asked, _, metric in _headlines(each.after)}
    known = set[Any]()
    for run in [Path(task["run"]) for task in tasks_of(folder)[:-1]]:
        for file in sorted(run.glob("eval/*/final/results.json")):
            for asked, benchmark, before in _headlines(_evaluation(file.parent)):
                if asked not in known:
                    known.add(asked)
                    yield EarlierScore(run, Score(benchmark, before.name, before, now.get(asked), is_headline=True))


def _headlines(evaluation: Evaluation) -> Iterator[tuple[Any, str, Metric]]:
    """Yield what identifies the questions of each benchmark, its name and its first metric.

    Another file of questions may have the same name.
    """
    for entry in evaluation.results.get("benchmarks", ()):
        name, reference = str(entry["name"]), entry.get("reference")
        lines = [line for line in evaluation.predictions if line.get("benchmark") == reference]
        metrics = [metric for benchmark, metric in evaluation.metrics if benchmark == name]
        if metrics:
            asked = frozenset((str(line.get("id")), str(line.get("question"))) for line in lines)
            yield (name, asked), name, metrics[0]


def _comparisons(folder: Path) -> Iterator[Comparison]:
    """Yield one comparison per suite: the base model with the final model, or else with its latest checkpoint."""
    for suite in sorted(path for path in folder.glob("*") if path.is_dir()):
        folders = {path.parent.name: path.parent for path in suite.glob("*/results.json")}
        steps = sorted((name for name in folders if name.startswith("checkpoint-")), key=_step)
        latest = "final" if "final" in folders else (steps[-1] if steps else None)
        before = _evaluation(folders["base"]) if "base" in folders else None
        after = _evaluation(folders[latest]) if latest else None
        if before or after:
            yield Comparison(suite.name, before, after, _scores(before, after), _gain(before, after))


def _gain(before: Evaluation | None, after: Evaluation | None) -> Gain | None:
    """Return the gain of the first benchmark; None if its answers cannot be compared."""
    sides = [side.predictions for side in (after, before) if side]
    if len(sides) < 2 or not all(sides):
        return None
    name = sides[0][0].get("benchmark")
    tuned, base = ([line for line in side if line.get("benchmark") == name] for side in sides)
    try:
        return evaluator().gain(base, tuned) if base else None
    except UserError:  # damaged answers, or a benchmark of the user whose code is not imported
        return None


def _step(name: str) -> int:
    digits = name.removeprefix("checkpoint-")
    return int(digits) if digits.isdigit() else -1


def _scores(before: Evaluation | None, after: Evaluation | None) -> tuple[Score, ...]:
    old = {(name, metric.name): metric for name, metric in (before.metrics if before else ())}
    new = {(name, metric.name): metric for name, metric in (after.metrics if after else ())}
    seen: set[str] = set()
    scores = []
    for key in {**new, **old}:
        scores.append(Score(*key, old.get(key), new.get(key), is_headline=key[0] not in seen))
        seen.add(key[0])
    return tuple(scores)


def _evaluation(folder: Path) -> Evaluation:
    results = _json(folder / "results.json", {})
    metrics = [
        (str(benchmark["name"]), Metric(**{key: value for key, value in metric.items() if key in Metric.__slots__}))
        for benchmark in results.get("benchmarks", ())
        for metric in benchmark["metrics"]
        if not metric.get("detail")
    ]
    return Evaluation(folder.parent.name, folder.name, results, tuple(metrics), tuple(_lines(folder)))


def _lines(folder: Path) -> Iterator[Json]:
    """Yield the predictions without an incomplete last line of a killed evaluation."""
    path = folder / "predictions.jsonl"
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def _layer(entry: Json) -> Layer:
    trained = entry.get("trained")
    return Layer(
        path=str(entry["path"]),
        tower=str(entry["tower"]),
        shape=tuple(entry["shape"]),
        sigma=tuple(entry["sigma"]),
        trained=(int(trained[0]), int(trained[1])) if trained else None,
        method=str(entry["method"]),
        note=entry.get("note"),
    )


def _json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not valid JSON: {error}", code="json-syntax", where=str(path), hint=RESTORE) from error


def _yaml(path: Path) -> Json:
    try:
        return parse_yaml(path.read_text(encoding="utf-8")) or {} if path.exists() else {}
    except ValueError as error:
        raise UserError(f"is not valid YAML: {error}", code="yaml-syntax", where=str(path), hint=RESTORE) from error
