"""Parts of a report: key figures, scores of suites, gallery of pictures with answers, versions, credits.

The gallery shows a representative sample of the questions with the answers of both models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from milora_data.pictures.files import credit_lines, fitting, thumbnail
from milora_vl.common.cli.table import Table
from milora_vl.report.run_page import Comparison, Evaluation, Json, Run, Score, label
from milora_vl.report.tables import score_tables
from milora_vl.report.wording import amount, duration, forgetting, gain, headline, interval, percent, points


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of one model to one question, and its score from 0 to 1."""

    text: str
    value: float

    @property
    def is_right(self) -> bool:
        """Return whether the answer counts as right in a count of right and wrong answers."""
        return self.value >= 0.5

    @property
    def verdict(self) -> str:
        """Return the score as text."""
        return {0.0: "wrong", 1.0: "right"}.get(self.value, f"{self.value:.0%} right")


@dataclass(frozen=True, slots=True)
class Question:
    """One test question with the answers of both models; None for a model without an evaluation.

    `context` is the conversation before the question, one line per turn.
    """

    key: str
    kind: str
    text: str
    context: str
    answers: tuple[str, ...]
    picture: Path | None
    before: Answer | None
    after: Answer | None


def questions(comparison: Comparison) -> list[Question]:
    """Return all questions of a suite in the order of the evaluation."""
    before, after = (_by_id(side.predictions if side else ()) for side in (comparison.before, comparison.after))
    rows = []
    for key in {**after, **before}:
        line = after.get(key) or before[key]
        pair = [_answer(side.get(key)) for side in (before, after)]
        picture = Path(str(line["image_file"])) if line.get("image_file") else None
        kind = label(str(line.get("type") or line.get("benchmark", "")))
        answers = tuple(map(str, line.get("answers", ())))
        earlier = "\n".join(_asked(str(text)) for _, text in line.get("context", ()))
        rows.append(Question("/".join(key), kind, _asked(str(line["question"])), earlier, answers, picture, *pair))
    return rows


def sample(items: Sequence[Question], count: int) -> list[Question]:
    """Return `count` representative questions; the choice is deterministic.

    The questions are sorted by type and outcome, and taken at equal distances. Every type and outcome then has about
    the same share as in all questions.
    """
    count = min(count, len(items))
    ordered = sorted(items, key=lambda item: (item.kind, _marks(item), _hash(item.key)))
    chosen = [ordered[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]
    return sorted(chosen, key=lambda item: _hash(item.key))


def outcomes(items: Sequence[Question]) -> dict[str, int]:
    """Count questions by outcome: both models right, one, or none. Empty unless both answered all questions."""
    both = [(item.before.is_right, item.after.is_right) for item in items if item.before and item.after]
    if not both or len(both) < len(items):
        return {}
    names = {"right before and after": (True, True), "newly right": (False, True), "no longer right": (True, False)}
    return {name: both.count(pair) for name, pair in {**names, "wrong before and after": (False, False)}.items()}


def _by_id(lines: Sequence[Json]) -> dict[tuple[str, str], Json]:
    return {(str(line.get("benchmark", "")), str(line["id"])): line for line in lines}


def _asked(text: str) -> str:
    """Return the text of a turn without the <image> placeholder."""
    return text.replace("<image>", "").strip()


def _answer(line: Json | None) -> Answer | None:
    return (
        Answer(shorten(str(line["prediction"]).strip(), 160, placeholder=" ..."), float(line["correct"]))
        if line and line["correct"] is not None  # None: a judge or a server scores it
        else None
    )


def _marks(item: Question) -> tuple[float, ...]:
    return tuple(answer.value if answer else -1.0 for answer in (item.after, item.before))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


GALLERY_SIZE = 24
_PICTURES = 2_000_000  # maximum size of all data URIs, in characters


@dataclass(frozen=True, slots=True)
class Fact:
    """One key figure below the title."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True, slots=True)
class Suite:
    """The section of one suite. `plot` is a key of the plots; `outcomes` is empty unless both models answered."""

    name: str
    has_before: bool
    has_after: bool
    plot: str
    outcomes: dict[str, int]
    tables: list[Table]


@dataclass(frozen=True, slots=True)
class Gallery:
    """The chosen questions, each with its picture as a data URI (None without one), and how they were chosen."""

    words: str
    cards: list[tuple[Question, str | None]]


def facts(run: Run) -> list[Fact]:
    """Return the key figures that the files of the run provide."""
    best = headline(run)
    figures = list(_score_facts(*best)) if best else []
    lost = next((lost for comparison in run.comparisons if (lost := forgetting(comparison))), None)
    if lost:
        figures.append(Fact("forgetting", f"{lost['kl']:.3f} nats", "per token of ordinary text"))
    trainable, total = run.policy.get("trainable"), run.policy.get("total")
    if trainable and total:
        figures.append(Fact("parameters trained", percent(trainable / total), f"{trainable:,} of {total:,}"))
    if run.environment.get("finished") and run.environment.get("seconds"):
        before = run.environment.get("seconds_before_training")
        start = f", {duration(before)} of it before the first step" if before else ""
        device = run.environment.get("device", "")
        figures.append(Fact("training", duration(run.environment["seconds"]), f"{device}{start}"))
    records = run.environment.get("data", {})
    if records.get("train"):
        skipped = f", {records['skipped']:,} skipped" if records.get("skipped") else ""
        if later := max((int(entry.get("skipped_records", 0)) for entry in run.history), default=0):
            skipped += f", {later:,} more while training"
        figures.append(
            Fact("training records", f"{records['train']:,}", f"{records.get('eval') or 0:,} for evaluation{skipped}")
        )
    return figures


def _score_facts(comparison: Comparison, score: Score) -> Iterator[Fact]:
    unit, baseline = score.any.unit, score.any.baseline
    if score.before and score.after:
        ends = f"from {amount(score.before.value, unit)} to {amount(score.after.value, unit)}"
        yield headline_gain(comparison, score) or Fact("gain", f"{gain(score)} points", ends)
    if baseline is not None:
        yield Fact("majority answer", amount(baseline, unit), "without looking at the picture")


def headline_gain(comparison: Comparison, score: Score) -> Fact | None:
    """Return the difference to the better of the base and the most frequent answer, with its interval."""
    if comparison.gain is None:
        return None
    name = {"base": "gain over the base", "majority": "gain over the majority answer"}[comparison.gain.over]
    return Fact(name, f"{points(comparison.gain.value, score)} points", interval(comparison.gain, score))


def suites(run: Run, plots: Sequence[str]) -> list[Suite]:
    """Return one entry per evaluated suite."""
    return [
        Suite(
            name=comparison.suite,
            has_before=comparison.before is not None,
            has_after=comparison.after is not None,
            plot=name if (name := f"scores-{comparison.suite}") in plots else "",
            outcomes=outcomes(questions(comparison)),
            tables=score_tables(comparison),
        )
        for comparison in run.comparisons
    ]


def gallery(run: Run) -> Gallery | None:
    """Return a representative sample of the questions of the first suite with pictures; None without questions."""
    best = headline(run)
    items = questions(best[0]) if best else []
    if not items:
        return None
    chosen = sample(items, GALLERY_SIZE)
    uris = fitting([thumbnail(item.picture) for item in chosen], _PICTURES)
    words = f"All {len(items):,} test questions."
    if len(chosen) < len(items):
        words = (
            f"{len(chosen)} of the {len(items):,} test questions, chosen automatically: sorted by type and outcome and "
            "taken at equal distances, so that every type and outcome has the same share as in the whole test."
        )
    return Gallery(words, [(item, uri or None) for item, uri in zip(chosen, uris, strict=True)])


def versions(run: Run) -> list[tuple[str, str]]:
    """Return the rows about machine and software."""
    known, git = run.environment, run.environment.get("git")
    if isinstance(git, Mapping):
        git = f"{str(git.get('commit'))[:12]}{', with local changes' if git.get('changed') else ''}"
    rows = [(name, known.get(name)) for name in ("device", "started", "finished", "seed", "base")]
    rows += [("resumed", _resumed(entry)) for entry in known.get("resumed", ())]
    rows += [("milora-vl commit", git), *known.get("versions", {}).items()]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _resumed(entry: Mapping[str, Any]) -> str:
    """Return one line about a resumption and the settings it changed.

    >>> _resumed({"from": "checkpoint-4", "at": "10:00", "changed": {"train.save_steps": [2.0, 1.0]}})
    '10:00 from checkpoint-4, with train.save_steps 2 -> 1'
    """
    values = {
        key: [f"{v:g}" if isinstance(v, float) else v for v in pair] for key, pair in entry.get("changed", {}).items()
    }
    changes = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in values.items())
    return f"{entry['at']} from {entry['from']}" + (f", with {changes}" if changes else "")


def credits_of(run: Run) -> list[str]:
    """Return the credits of the pictures, from README.md files near the records and the test pictures."""
    path = (run.recipe.get("data") or {}).get("path") or []
    folders = [Path(entry["path"]).parent for entry in path] if isinstance(path, list) else [Path(path).parent]
    files = {line.get("image_file") for side in sides(run) for line in side.predictions[:50]}
    for file in sorted(str(file) for file in files if file):
        folders += [Path(file).parent, Path(file).parent.parent]
    return credit_lines(folder for folder in folders if folder.resolve() != run.folder.resolve())


def sides(run: Run) -> Iterator[Evaluation]:
    """Yield every evaluation that the page shows."""
    for comparison in run.comparisons:
        yield from (side for side in (comparison.before, comparison.after) if side)
