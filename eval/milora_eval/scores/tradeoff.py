"""What training gained on its targets and changed elsewhere, from stored answers; sequences of tasks.

Every number compares two models on the same questions. GEM defines final accuracy and backward transfer (Lopez-Paz &
Ranzato 2017, arXiv:1706.08840, section 2), iCaRL the average over the stages, its average incremental accuracy
(Rebuffi et al. 2017, arXiv:1611.07725, section 4).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_eval.answers.store import PREDICTIONS, Line
from milora_eval.scores.compare import Pair, headline
from milora_eval.scores.results import check_ids, read_results, require_answers, require_lines
from milora_eval.stats import MIN_GROUPS, MIN_UNLIKE, mean
from milora_eval.suites import stored_benchmark
from milora_vl.common.cli.command_line import amount, suggest
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.checkpoints import step_of

# Settings that name the weights or do not change the answers; all others are compared.
WEIGHTS = ("base", "adapter", "scale", "key", "batch_size")
MUST_AGREE = ("decoding", "max_new_tokens")


@dataclass(frozen=True, slots=True)
class ModelAnswers:
    """The stored answers of one model: the lines of each benchmark and the settings they were generated with."""

    name: str
    folders: list[Path]
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
class Stage:
    """One run: its headline of each benchmark beside the base's, the mean gain and the mean change elsewhere."""

    name: str
    pairs: dict[str, Pair]
    gain: Mean
    held_out: Mean


@dataclass(frozen=True, slots=True)
class Sequential:
    """Numbers of tasks that are learned one after another, with R[i, j] the score on task j after learning task i.

    `final` is the mean of R[T, j], `average` the mean over the stages i of the mean of R[i, 1..i], and `backward` the
    mean of R[T, j] - R[j, j] over the tasks before the last.
    """

    final: Mean
    average: float
    backward: Mean


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """All stages, over the benchmarks that every evaluation has. `notes` lists what was left out and what differs."""

    targets: tuple[str, ...]
    held_out: tuple[str, ...]
    stages: list[Stage]
    notes: list[str]
    sequence: Sequential | None = None


def read_evaluation(folder: Path, which: str, name: str) -> ModelAnswers:
    """Read the answers in a results folder, or in all `eval/*/WHICH` of a run; of a checkpoint those with its name.

    Raises UserError without answers, with too few, and for a benchmark with other answers in another suite of the run.
    """
    run, which = (folder.parent, folder.name) if step_of(folder) >= 0 else (folder, which)
    folders = sorted(path.parent for path in run.glob(f"eval/*/{which}/{PREDICTIONS}"))
    if (folder / PREDICTIONS).is_file():
        folders = [folder]
    elif not folders:
        require_answers(run)
    found = ModelAnswers(name, folders, {}, {})
    for each in folders:
        lines, results = require_lines(each), read_results(each)
        check_ids(each, results)
        for reference in dict.fromkeys(line["benchmark"] for line in lines):
            own = [line for line in lines if line["benchmark"] == reference]
            known = found.lines.setdefault(stored_benchmark(reference).name, own)
            if _keys(known) != _keys(own):
                raise UserError(
                    f"{folder} has two evaluations of {reference} with different answers",
                    code="tradeoff-two-evaluations",
                    where=str(each),
                    hint="name the results folder of one of them, eval/SUITE/WHICH",
                )
            found.settings[stored_benchmark(reference).name] = results.get("generation") or {}
    return found


def tradeoff(base: ModelAnswers, runs: Sequence[ModelAnswers], targets: Sequence[str], *, sequence: bool) -> Tradeoff:
    """Compare runs with their base: the gain on the targets, the change on every other benchmark that all have.

    With `sequence`, run i was trained on target i after the targets before it; its gain is over the targets so far.
    Raises UserError for a target that an evaluation lacks or that has no score, for other rules, settings or questions,
    and if nothing is held out, except in a sequence.
    """
    everyone = [base, *runs]
    _require_targets(targets, everyone, len(runs), sequence)
    names, notes = _shared(everyone)
    notes += _settings(everyone, names)
    shared = {name: _common(everyone, name, notes) for name in names}
    compared = {name: [headline(lines[0], own) for own in lines[1:]] for name, lines in shared.items()}
    pairs = {name: [pair for pair in own if pair is not None] for name, own in compared.items() if all(own)}
    notes += [f"left out: {name} has no score yet" for name in compared if name not in pairs]
    if no_score := [name for name in targets if name not in pairs]:
        hint = "the judge scores it: python -m milora_eval judge FOLDER; or a server does"
        raise UserError(f"{no_score[0]} has no score yet", code="tradeoff-no-score", where="--targets", hint=hint)
    held_out = tuple(name for name in pairs if name not in targets)
    if not held_out and not sequence:
        raise UserError(
            "nothing is held out: every benchmark that all evaluations have is a target",
            code="tradeoff-nothing-held-out",
            where="--targets",
            hint="evaluate the base and the runs on more benchmarks, for example --suite held-out",
        )
    if points := [name for name in (*targets, *held_out) if pairs[name][0].b.unit == "points"]:
        notes.append(f"not in the means, because their unit is points: {', '.join(points)}")
        if sequence and points[0] in targets:
            message = f"{points[0]} is measured in points, which cannot be averaged with fractions"
            raise UserError(message, code="flag-conflict", where="--sequence")
    groups = {name: len({line["group"] for line in lines[0]}) for name, lines in shared.items()}
    stages = []
    for place, run in enumerate(runs):
        gain, kept = (
            mean_change([pairs[name][place] for name in part], groups)
            for part in (targets[: place + 1] if sequence else targets, held_out)
        )
        stages.append(Stage(run.name, {name: own[place] for name, own in pairs.items()}, gain, kept))
    summary = _sequence(shared, pairs, targets, groups) if sequence else None
    return Tradeoff(tuple(targets), held_out, stages, notes, summary)


def mean_change(pairs: Sequence[Pair], groups: Mapping[str, int]) -> Mean:
    """Return the mean paired difference of the benchmarks whose headline is a fraction, in percent.

    The standard error treats the benchmarks as independent; the interval is 1.96 standard errors on each side. `groups`
    is the number of independent questions of each benchmark.
    """
    pairs = [pair for pair in pairs if pair.b.unit == "fraction"]
    if not pairs:
        return Mean(None, note="no benchmark to average")
    value = mean([change(pair) for pair in pairs])
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


def change(pair: Pair) -> float:
    """Return b minus a, in percent or points."""
    return (100 if pair.b.unit == "fraction" else 1) * (pair.b.value - pair.a.value)


def _sequence(
    shared: Mapping[str, list[list[Line]]],
    pairs: Mapping[str, list[Pair]],
    targets: Sequence[str],
    groups: Mapping[str, int],
) -> Sequential:
    scores = [[pairs[name][stage].b for name in targets] for stage in range(len(targets))]
    errors = [metric.stderr for metric in scores[-1] if metric.stderr is not None]
    stderr = 100 * math.sqrt(math.fsum(error**2 for error in errors)) / len(targets)
    final = Mean(100 * mean([metric.value for metric in scores[-1]]), stderr if len(errors) == len(targets) else None)
    so_far = [mean([metric.value for metric in own[: stage + 1]]) for stage, own in enumerate(scores)]
    kept = [headline(shared[name][stage], shared[name][-1]) for stage, name in enumerate(targets[:-1], start=1)]
    return Sequential(final, 100 * mean(so_far), mean_change([pair for pair in kept if pair is not None], groups))


def _keys(lines: Sequence[Line]) -> Counter[tuple[str, str]]:
    return Counter((line["id"], line["prediction"]) for line in lines)


def _require_targets(targets: Sequence[str], everyone: Sequence[ModelAnswers], num_runs: int, sequence: bool) -> None:
    for name in targets:
        for each in everyone:
            if name not in each.lines:
                near = suggest(name, each.lines)
                raise UserError(
                    f"{each.name} has no answers to {name}; it has: {', '.join(each.lines)}",
                    code="tradeoff-missing-target",
                    where="--targets",
                    hint=f"did you mean {near[0]}?" if near else "to generate them: python -m milora_eval run",
                )
    if doubled := next((name for name, times in Counter(targets).items() if times > 1), None):
        raise UserError(f"{doubled} is named twice", code="flag-value", where="--targets")
    if sequence and (num_runs != len(targets) or num_runs < 2):
        raise UserError(
            f"needs one run for each target, at least two, in the order of learning; got {amount(num_runs, 'run')} "
            f"and {amount(len(targets), 'target')}",
            code="flag-conflict",
            where="--sequence",
        )


def _shared(everyone: Sequence[ModelAnswers]) -> tuple[list[str], list[str]]:
    """Return the benchmarks that all have, and a note for each other one. Raises UserError for different rules."""
    names, notes = [], []
    for name in dict.fromkeys(name for each in everyone for name in each.lines):
        lacking = [each.name for each in everyone if name not in each.lines]
        if lacking:
            notes.append(f"left out: {name} is not in {', '.join(lacking)}")
            continue
        rules = {each.lines[name][0]["benchmark"]: each.name for each in everyone}
        if len(rules) > 1:
            (first, a), (second, b) = list(rules.items())[:2]
            raise UserError(
                f"{name} is scored by different rules: {first} in {a}, {second} in {b}",
                code="tradeoff-different-rules",
                hint="evaluate all of them with the same --protocol",
            )
        names.append(name)
    return names, notes


def _common(everyone: Sequence[ModelAnswers], name: str, notes: list[str]) -> list[list[Line]]:
    """Return, per evaluation, the answers to the questions that all have, in the order of the base's.

    Adds a note if some have more. Raises UserError without common questions, and if one id belongs to two questions.
    """
    by_id = [{line["id"]: line for line in each.lines[name]} for each in everyone]
    ids = [key for key in by_id[0] if all(key in lines for lines in by_id[1:])]
    if not ids:
        raise UserError(
            f"the evaluations have no question of {name} in common",
            code="eval-nothing-in-common",
            hint="evaluate them with the same data and --limit",
        )
    for each, lines in zip(everyone[1:], by_id[1:], strict=True):
        if other := [key for key in ids if _asked(lines[key]) != _asked(by_id[0][key])]:
            raise UserError(
                f"{amount(len(other), 'question')} of {name} in {each.name} differ from the base's with that id, "
                f'the first id is "{other[0]}"',
                code="tradeoff-other-questions",
                hint="evaluate both with the same files",
            )
    if any(len(lines) > len(ids) for lines in by_id):
        counts = ", ".join(f"{each.name} {len(lines):,}" for each, lines in zip(everyone, by_id, strict=True))
        notes.append(f"{name}: compared on the {amount(len(ids), 'question')} that all have ({counts})")
    return [[lines[key] for key in ids] for lines in by_id]


def _asked(line: Line) -> list[Any]:
    return [line["question"], line.get("context"), line["answers"]]


def _settings(everyone: Sequence[ModelAnswers], names: Sequence[str]) -> list[str]:
    """Return a note for each setting in which a run differs from the base. Raises UserError if it must agree."""
    notes: dict[str, None] = {}
    for name in names:
        base, *others = [(each.name, each.settings[name]) for each in everyone]
        for run, settings in others:
            for key in sorted((base[1].keys() | settings.keys()) - set(WEIGHTS)):
                a, b = base[1].get(key), settings.get(key)
                if key == "max_new_tokens":
                    a, b = (a or {}).get(name), (b or {}).get(name)
                if a == b:
                    continue
                if key in MUST_AGREE and a is not None and b is not None:
                    raise UserError(
                        f"{name} was answered with different settings: {key} is {a} in {base[0]}, {b} in {run}",
                        code="tradeoff-different-settings",
                        hint="evaluate both again with the same settings",
                    )
                notes[f"{run} was evaluated with another {key} than {base[0]}"] = None
    return list(notes)
