"""Compare evaluations of the same questions: paired differences, errors, intervals and tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from milora_eval.answers.store import PREDICTIONS, Line, by_question, expected_of, to_answer
from milora_eval.benchmark import Answer, Benchmark, Metric
from milora_eval.registry import stored_benchmark
from milora_eval.scores.results import (
    check_ids,
    read_results,
    require_answers,
    require_lines,
    suite_mean,
    write_results,
)
from milora_eval.stats import (
    MIN_GROUPS,
    MIN_UNLIKE,
    PairedDifference,
    mean,
    paired_difference,
    resampled_difference,
    too_few,
)
from milora_vl.common.cli.console import amount
from milora_vl.common.errors import UserError, did_you_mean, suggest
from milora_vl.core.adapter.folders import step_of

WORK = 1_000_000  # largest number of answers that a bootstrap scores
MIN_RESAMPLES = 100
# Settings that name the weights, or change no answer.
WEIGHTS = ("weights", "served_model", "probe", "key", "batch_size")
OUTCOMES = {(1, 1): "kept", (0, 1): "gained", (1, 0): "lost", (0, 0): "never"}  # is the answer right: of a, of b


@dataclass(frozen=True, slots=True)
class Pair:
    """One metric on both sides, over their common items. `difference` is b minus a; None if it cannot be paired."""

    benchmark: str
    a: Metric
    b: Metric
    difference: PairedDifference | None

    @property
    def change(self) -> float:
        """b minus a, in percent or points."""
        return self.b.scale * (self.b.value - self.a.value)


Over = Literal["base", "majority"]


@dataclass(frozen=True, slots=True)
class Gain:
    """The paired difference of a tuned model to the better of its base and the most frequent answer.

    It has the unit of the benchmark's headline, with its 95 % interval; None: too few items for one.
    """

    over: Over
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Paired:
    """One benchmark over the `n` equal questions that a base and a tuned model answer, of `asked` (base, tuned).

    `headline` names the metric of `pairs` to show first: where most of the base's answers were cut, the one that counts
    a mention. `gain` is of it. `outcomes` counts the scored questions by what happened to their answer. `cut` is the
    number of answers that reached the token limit.
    """

    benchmark: str
    reference: str
    n: int
    asked: tuple[int, int]
    cut: tuple[int, int]
    outcomes: dict[str, int]
    pairs: list[Pair]
    headline: str | None
    gain: Gain | None


def compare(a: Sequence[Line], b: Sequence[Line]) -> list[Paired]:
    """Compare two models on the questions that both answer, by benchmark; one without common questions is left out."""
    found = []
    for name in dict.fromkeys(line["benchmark"] for line in a):
        sides = [[line for line in side if line["benchmark"] == name] for side in (a, b)]
        left, right = common(sides)
        if left:
            found.append(_paired(name, left, right, (len(sides[0]), len(sides[1]))))
    return found


def _paired(name: str, a: Sequence[Line], b: Sequence[Line], asked: tuple[int, int]) -> Paired:
    pairs = _pairs(name, a, b)
    cut, right = ([sum(bool(line.get("truncated")) for line in side) for side in (a, b)]), Counter[str]()
    wanted = "mention" if 2 * cut[0] > len(a) else "score"
    headline = next((pair for pair in pairs if pair.b.counts == wanted), next(iter(pairs), None))
    for before, after in zip(a, b, strict=True):
        if before["correct"] is not None and after["correct"] is not None:
            right[OUTCOMES[int(before["correct"] >= 0.5), int(after["correct"] >= 0.5)]] += 1
    outcomes = {outcome: right[outcome] for outcome in OUTCOMES.values()} if right else {}
    benchmark, first, gain = stored_benchmark(name), None, None
    if headline is not None:
        first, gain = headline.b.name, _gain(benchmark, headline, list(map(to_answer, b)))
    return Paired(benchmark.name, name, len(a), asked, (cut[0], cut[1]), outcomes, pairs, first, gain)


def _gain(benchmark: Benchmark, headline: Pair, tuned: Sequence[Answer]) -> Gain | None:
    """Return how much better the tuned model is than the base and than the most frequent answer."""
    over: Over = "base"
    difference, metric = headline.difference, headline.b
    if metric.mean_of is not None and metric.baseline is not None and metric.baseline > headline.a.value:
        majority = [replace(answer, value=answer.item.baseline) for answer in tuned]
        over, difference = "majority", _difference(benchmark, metric, majority, tuned)
    return None if difference is None else Gain(over, difference.value, difference.low, difference.high)


def store_comparison(folder: Path) -> list[Path]:
    """Write the comparison of the answers in a results folder with those in `base` beside it into its results.json.

    After the base's own evaluation, all folders beside it are compared with it again. Returns the compared folders.
    """
    results = {key: value for key, value in read_results(folder).items() if key != "comparison"}
    base, others = folder.parent / "base", list[Path]()
    if results.get("which") == "base":
        others = [path.parent for path in sorted(folder.parent.glob(f"*/{PREDICTIONS}")) if path.parent != folder]
    elif results.get("which") is not None and (base / PREDICTIONS).is_file():
        sides = [_evaluation(each, name) for each, name in ((base, "the base"), (folder, results["which"]))]
        try:
            shared, notes = _shared(sides)
        except UserError as error:  # other rules, or other questions
            shared, notes = {}, [str(error)]
        paired = [
            _paired(a[0]["benchmark"], a, b, (len(sides[0].lines[name]), len(sides[1].lines[name])))
            for name, (a, b) in shared.items()
        ]
        results["comparison"] = {
            "benchmarks": list(map(asdict, paired)),
            "means": [suite_mean(results["suite"], _entries(paired, side)) for side in ("a", "b")],
            "notes": notes,
        }
    write_results(folder, results)
    return [folder, *(each for other in others for each in store_comparison(other))]


def _entries(paired: Sequence[Paired], side: Literal["a", "b"]) -> list[dict[str, Any]]:
    return [
        {"name": each.benchmark, "metrics": [{"value": getattr(pair, side).value} for pair in each.pairs]}
        for each in paired
    ]


def stored_pairs(comparison: Mapping[str, Any]) -> list[Pair]:
    """Return the pairs of metrics of a stored comparison."""
    return [
        Pair(name, Metric(**a), Metric(**b), None if difference is None else PairedDifference(**difference))
        for entry in comparison["benchmarks"]
        for name, a, b, difference in map(dict.values, entry["pairs"])
    ]


def common(sides: Sequence[Sequence[Line]]) -> list[list[Line]]:
    """Return, per side, the answers to the questions of one benchmark that all sides have, in the order of their keys.

    Ids and names of pictures do not count: two files can use one name for different questions.
    """
    by_key = list(map(by_question, sides))
    keys = sorted(set(by_key[0]).intersection(*by_key[1:]))
    return [[lines[key] for key in keys] for lines in by_key]


def _pairs(name: str, a: Sequence[Line], b: Sequence[Line], count: int | None = None) -> list[Pair]:
    """Return the first `count` metrics that both sides have (default: all)."""
    benchmark = stored_benchmark(name)
    left, right = list(map(to_answer, a)), list(map(to_answer, b))
    with expected_of(benchmark, name):
        others = {metric.name: metric for metric in benchmark.summarise(right)}
        found = [(metric, others[metric.name]) for metric in benchmark.summarise(left) if metric.name in others][:count]
        resampled = _resampled(benchmark, found, left, right)
        return [
            Pair(
                benchmark.name, metric, other,
                resampled.get(metric.name) or _difference(benchmark, metric, left, right),
            )
            for metric, other in found
        ]  # fmt: skip


def _difference(
    benchmark: Benchmark, metric: Metric, a: Sequence[Answer], b: Sequence[Answer]
) -> PairedDifference | None:
    if metric.mean_of is None:
        return None
    if metric.counts == "mention":
        a, b = benchmark.mentioned(a), benchmark.mentioned(b)
    else:
        a, b = benchmark.units(a), benchmark.units(b)
    indices = [index for index in range(len(a)) if a[index].value is not None and b[index].value is not None]
    if metric.mean_of == "items":
        indices = [index for index in indices if a[index].item.kind == metric.name] or indices
    return paired_difference(
        [a[index].worth for index in indices],
        [b[index].worth for index in indices],
        [a[index].item.kind if metric.mean_of == "types" else "" for index in indices],
        [a[index].item.group for index in indices],
    )


def _copy(answer: Answer, times: int) -> Answer:
    if not times:
        return answer
    return replace(answer, item=replace(answer.item, group=f"{answer.item.group} again {times}"))


def _resampled(
    benchmark: Benchmark, pairs: Sequence[tuple[Metric, Metric]], a: Sequence[Answer], b: Sequence[Answer]
) -> dict[str, PairedDifference]:
    """Return the bootstrapped difference of the headline if it is not a mean over items; else an empty dict.

    Each draw computes all numbers of the benchmark again, so more answers mean fewer draws.
    """
    resamples = min(1000, WORK // max(len(a), 1))
    groups = [answer.item.group for answer in a]
    if not pairs or pairs[0][0].mean_of is not None or resamples < MIN_RESAMPLES or len(set(groups)) < 2:
        return {}
    (left, right), name = pairs[0], pairs[0][0].name

    def compute(drawn: list[tuple[int, int]]) -> float | None:
        sides = [benchmark.summarise([_copy(side[index], times) for index, times in drawn]) for side in (a, b)]
        before, after = ({metric.name: metric.value for metric in side} for side in sides)
        return after[name] - before[name] if name in before and name in after else None

    stderr, low, high, p_value = resampled_difference(compute, groups, resamples)
    only = [x.worth - y.worth for x, y in zip(a, b, strict=True)]
    note = too_few(only, groups)
    return {
        name: PairedDifference(
            value=right.value - left.value,
            stderr=stderr,
            low=None if note else low,
            high=None if note else high,
            only_a=sum(gap > 0 for gap in only),
            only_b=sum(gap < 0 for gap in only),
            p_value=None,
            n=len(a),
            p_bootstrap=None if note else p_value,
            note=note,
        )
    }


@dataclass(frozen=True, slots=True)
class ModelAnswers:
    """The stored answers of one model: the lines of each benchmark and the settings they were generated with."""

    name: str
    lines: dict[str, list[Line]]
    settings: dict[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over benchmarks, in percent, with its 95 % interval; without one, `note` says why."""

    value: float | None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class RunGain:
    """One run: its headline of each benchmark beside the base's, the mean gain and the mean change elsewhere."""

    name: str
    pairs: dict[str, Pair]
    gain: Mean
    held_out: Mean


@dataclass(frozen=True, slots=True)
class Comparison:
    """All runs, over the benchmarks that every evaluation has. `notes` lists what was left out and what differs."""

    targets: tuple[str, ...]
    held_out: tuple[str, ...]
    runs: list[RunGain]
    notes: list[str]


def read_evaluation(folder: Path, which: str, name: str) -> ModelAnswers:
    """Read the answers in a results folder, or in all `eval/*/WHICH` of a run; of a checkpoint those with its name.

    Raises UserError without answers, with too few, and for a benchmark with other answers in another suite of the run.
    """
    run, which = (folder.parent, folder.name) if step_of(folder) >= 0 else (folder, which)
    folders = sorted(path.parent for path in run.glob(f"eval/*/{which}/{PREDICTIONS}"))
    if (folder / PREDICTIONS).is_file() or not folders:
        folders = [folder]
        require_answers(run if step_of(folder) >= 0 else folder)
    found = ModelAnswers(name, {}, {})
    for each in folders:
        check_ids(each, read_results(each))
        for benchmark, own in _evaluation(each, name).lines.items():
            known = found.lines.setdefault(benchmark, own)
            if _answered(known) != _answered(own):
                message = f"{folder} has two evaluations of {own[0]['benchmark']} with different answers"
                hint = "name the results folder of one of them, eval/SUITE/WHICH"
                raise UserError(message, code="compare-two-evaluations", where=str(each), hint=hint)
            found.settings[benchmark] = read_results(each).get("generation") or {}
    return found


def _evaluation(folder: Path, name: str) -> ModelAnswers:
    found, settings = ModelAnswers(name, {}, {}), read_results(folder).get("generation") or {}
    benchmark_of = cache(stored_benchmark)
    for line in require_lines(folder):
        benchmark = benchmark_of(line["benchmark"]).name
        found.lines.setdefault(benchmark, []).append(line)
        found.settings[benchmark] = settings
    return found


def named_like(base: ModelAnswers, run: ModelAnswers) -> ModelAnswers:
    """Return the answers of a run with its files of own questions named as in the base: questions tell a file."""
    own, lines, settings = _own(base), dict(run.lines), dict(run.settings)
    for name, keys in _own(run).items():
        other = next((each for each in own if each not in lines and own[each] & keys), None)
        if name not in own and other is not None:
            lines[other] = [line | {"benchmark": base.lines[other][0]["benchmark"]} for line in lines.pop(name)]
            limits = settings[name].get("max_new_tokens") or {}
            settings[other] = {**settings.pop(name), "max_new_tokens": {other: limits.get(name)}}
    return ModelAnswers(run.name, lines, settings)


def _own(evaluation: ModelAnswers) -> dict[str, set[str]]:
    """Return the keys of the questions in each file of own questions."""
    own = {name: lines for name, lines in evaluation.lines.items() if lines[0]["benchmark"].startswith("data:")}
    return {name: {line["question_key"] for line in lines} for name, lines in own.items()}


def _answered(lines: Sequence[Line]) -> Counter[tuple[str, str]]:
    return Counter((line["question_key"], line["prediction"]) for line in lines)


def compare_runs(base: ModelAnswers, runs: Sequence[ModelAnswers], targets: Sequence[str] = ()) -> Comparison:
    """Compare runs with their base: the gain on the targets, the change on every other benchmark that all have.

    Raises UserError for a target that an evaluation lacks or that has no score, for different rules, and if nothing is
    in common.
    """
    everyone = [base, *runs]
    _require_targets(targets, everyone)
    shared, notes = _shared(everyone)
    pairs: dict[str, list[Pair]] = {}
    for name, lines in shared.items():
        found = [_pairs(lines[0][0]["benchmark"], lines[0], own, count=1) for own in lines[1:]]
        if all(found):
            pairs[name] = [pair for (pair,) in found]
        else:
            notes.append(f"left out: {name} has no score here; a server or an official script scores it")
    if lacking := [name for name in targets if name not in pairs]:
        raise UserError(f"{lacking[0]} cannot be compared", where="--targets", hint="\n".join(notes))
    held_out = tuple(name for name in pairs if name not in targets)
    if points := [name for name in (*targets, *held_out) if pairs[name][0].b.unit == "points"]:
        notes.append(f"not in the means, because their unit is points: {', '.join(points)}")
    groups = {name: len({line["group"] for line in lines[0]}) for name, lines in shared.items()}
    gains = []
    for number, run in enumerate(runs):
        of_run = {name: own[number] for name, own in pairs.items()}
        gained, kept = (mean_change([of_run[name] for name in part], groups) for part in (targets, held_out))
        gains.append(RunGain(run.name, of_run, gained, kept))
    return Comparison(tuple(targets), held_out, gains, notes)


def mean_change(pairs: Sequence[Pair], groups: Mapping[str, int]) -> Mean:
    """Return the mean paired difference of the benchmarks whose headline is a fraction, in percent.

    The standard error treats the benchmarks as independent; the interval is 1.96 standard errors on each side. `groups`
    is the number of independent questions of each benchmark.
    """
    pairs = [pair for pair in pairs if pair.b.unit == "fraction"]
    if not pairs:
        return Mean(None, note="no benchmark to average")
    value = mean([pair.change for pair in pairs])
    differences = [pair.difference for pair in pairs if pair.difference is not None]
    errors = [each.stderr for each in differences if each.stderr is not None]
    if len(errors) < len(pairs):
        return Mean(value, note="no interval: a benchmark has no paired error")
    stderr = 100 * math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
    small = [pair.benchmark for pair in pairs if groups[pair.benchmark] < MIN_GROUPS]
    changed = sum(each.only_a + each.only_b for each in differences)
    if small:
        note = f"no interval: fewer than {MIN_GROUPS} independent questions in {', '.join(small)}"
        return Mean(value, stderr, note=note)
    if changed < MIN_UNLIKE:
        return Mean(value, stderr, note=f"no interval: only {amount(changed, 'answer')} changed in value")
    return Mean(value, stderr, value - 1.96 * stderr, value + 1.96 * stderr)


def _require_targets(targets: Sequence[str], everyone: Sequence[ModelAnswers]) -> None:
    for name in targets:
        for each in everyone:
            if name not in each.lines:
                message = f"{each.name} has no answers to {name}; it has: {', '.join(each.lines)}"
                hint = did_you_mean(suggest(name, each.lines)[:1]) or "to generate them: python -m milora_eval run"
                raise UserError(message, where="--targets", hint=hint)
    if doubled := next((name for name, times in Counter(targets).items() if times > 1), None):
        raise UserError(f"{doubled} is named twice", where="--targets")


def _shared(everyone: Sequence[ModelAnswers]) -> tuple[dict[str, list[list[Line]]], list[str]]:
    """Return, per benchmark that all have, each one's answers to the common questions, and notes on what differs.

    Raises UserError for different rules, and if all have no question in common.
    """
    shared, notes = {}, []
    for name in dict.fromkeys(name for each in everyone for name in each.lines):
        lacking = [each.name for each in everyone if name not in each.lines]
        if lacking:
            notes.append(f"left out: {name} is not in {', '.join(lacking)}")
            continue
        sides = [each.lines[name] for each in everyone]
        rules = {lines[0]["benchmark"]: each.name for each, lines in zip(everyone, sides, strict=True)}
        if len(rules) > 1:
            which = ", ".join(f"{rule} in {run}" for rule, run in rules.items())
            hint = "evaluate all of them with the same --protocol"
            raise UserError(f"{name} is scored by different rules: {which}", code="compare-other-rules", hint=hint)
        lines = common(sides)
        counts = ", ".join(f"{each.name} {len(side):,}" for each, side in zip(everyone, sides, strict=True))
        if lines[0]:
            shared[name] = lines
            if any(len(side) > len(lines[0]) for side in sides):
                notes.append(f"{name}: compared on the {amount(len(lines[0]), 'question')} that all have ({counts})")
        else:
            notes.append(f"left out: {name} has no question in common ({counts})")
    if not shared:
        hint = "\n".join([*notes, "all must come from the same benchmark and data"])
        raise UserError("the evaluations have no question in common", code="eval-nothing-in-common", hint=hint)
    return shared, [*notes, *_other_settings(everyone, list(shared))]


def _other_settings(everyone: Sequence[ModelAnswers], names: Sequence[str]) -> list[str]:
    """Return a note for each setting in which a run differs from the base."""
    notes: dict[str, None] = {}
    base, *runs = everyone
    for name in names:
        for run in runs:
            settings, others = base.settings[name], run.settings[name]
            for key in sorted((settings.keys() & others.keys()) - set(WEIGHTS)):
                a, b = settings[key], others[key]
                if key == "max_new_tokens":
                    a, b = a.get(name), b.get(name)
                if a != b:
                    notes[f"{run.name} was evaluated with another {key} than {base.name}"] = None
    return list(notes)
