"""The pictures of a report: which questions to show (a fair sample, never a choice), with both models' answers.

The parts of a report that are neither table nor plot: key figures, suites, gallery, commands, versions, credits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from milora_data.page.credits import credit_lines
from milora_data.page.pictures import fitting, thumbnail
from milora_vl.report.run_page import Comparison, Evaluation, Json, Run, Score, label
from milora_vl.report.tables import Table, score_tables
from milora_vl.report.wording import amount, duration, forgetting, gain, headline, percent


@dataclass(frozen=True, slots=True)
class Said:
    """One model's answer to one question and what it earned, 0 to 1."""

    text: str
    value: float

    @property
    def is_right(self) -> bool:
        """Whether it counts as right when one must say so."""
        return self.value >= 0.5

    @property
    def verdict(self) -> str:
        """The mark in words."""
        return {0.0: "wrong", 1.0: "right"}.get(self.value, f"{self.value:.0%} right")


@dataclass(frozen=True, slots=True)
class Question:
    """One test question with what the two models said; a model that was not evaluated said None.

    `context` is the conversation before the question, a line a turn.
    """

    key: str
    kind: str
    text: str
    context: str
    answers: tuple[str, ...]
    picture: Path | None
    before: Said | None
    after: Said | None


def questions(comparison: Comparison) -> list[Question]:
    """All questions of a suite, in the order they were asked."""
    before, after = (_by_id(side.predictions if side else ()) for side in (comparison.before, comparison.after))
    rows = []
    for key in {**after, **before}:
        line = after.get(key) or before[key]
        said = [_said(side.get(key)) for side in (before, after)]
        picture = Path(str(line["image_file"])) if line.get("image_file") else None
        kind, answers = str(line.get("type") or line.get("benchmark", "")), tuple(map(str, line.get("answers", ())))
        earlier = "\n".join(_asked(str(text)) for _, text in line.get("context", ()))
        rows.append(Question("/".join(key), kind, _asked(str(line["question"])), earlier, answers, picture, *said))
    return rows


def sample(items: Sequence[Question], count: int) -> list[Question]:
    """Pick `count` questions that stand for all, the same ones every time.

    Sorted by type and outcome they are cut into `count` runs of equal length, and one is taken from the middle of each:
    so every type and outcome has about the share it has in the whole. No picture twice, if that can be helped.
    """
    count = min(count, len(items))
    ordered = sorted(items, key=lambda item: (item.kind, _marks(item), _hash(item.key)))
    chosen: list[Question] = []
    for index in range(count):
        window = ordered[index * len(items) // count : (index + 1) * len(items) // count]
        outwards = sorted(range(len(window)), key=lambda place: abs(2 * place - len(window) + 1))
        shown = {item.picture for item in chosen if item.picture}
        fresh = (window[place] for place in outwards if window[place].picture not in shown)
        chosen.append(next(fresh, window[outwards[0]]))
    return sorted(chosen, key=lambda item: _hash(item.key))


def outcomes(items: Sequence[Question]) -> dict[str, int]:
    """Count the questions by who got them right: both, one of the two, neither; empty unless both answered all."""
    both = [(item.before.is_right, item.after.is_right) for item in items if item.before and item.after]
    if not both or len(both) < len(items):
        return {}
    names = {"right before and after": (True, True), "newly right": (False, True), "no longer right": (True, False)}
    return {name: both.count(pair) for name, pair in {**names, "wrong before and after": (False, False)}.items()}


def _by_id(lines: Sequence[Json]) -> dict[tuple[str, str], Json]:
    return {(str(line.get("benchmark", "")), str(line["id"])): line for line in lines}


def _asked(text: str) -> str:
    """A turn without the mark that says where the picture goes."""
    return text.replace("<image>", "").strip()


def _said(line: Json | None) -> Said | None:
    return (
        Said(shorten(str(line["prediction"]).strip(), 160, placeholder=" ..."), float(line["correct"]))
        if line and line["correct"] is not None  # None: a judge or a server scores
        else None
    )


def _marks(item: Question) -> tuple[float, ...]:
    return tuple(said.value if said else -1.0 for said in (item.after, item.before))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


GALLERY_SIZE = 24
_PICTURES = 2_000_000  # characters that they may take


@dataclass(frozen=True, slots=True)
class Fact:
    """One figure of the strip under the title."""

    name: str
    value: str
    more: str = ""


@dataclass(frozen=True, slots=True)
class Suite:
    """What the page says of one suite; `plot` is a key of the plots, `outcomes` empty unless both models answered."""

    name: str
    has_before: bool
    has_after: bool
    plot: str
    outcomes: dict[str, int]
    tables: list[Table]


@dataclass(frozen=True, slots=True)
class Card:
    """One question of the gallery; `uri` is its picture."""

    question: Question
    kind: str
    uri: str | None


@dataclass(frozen=True, slots=True)
class Gallery:
    """The pictures and how they were chosen."""

    words: str
    cards: list[Card]


def facts(run: Run) -> list[Fact]:
    """The key figures that the run has."""
    best = headline(run)
    found = list(_score_facts(best[1])) if best else []
    lost = next((lost for comparison in run.comparisons if (lost := forgetting(comparison))), None)
    if lost:
        found.append(Fact("forgetting", f"{lost['kl']:.3f} nats", "a token of ordinary text"))
    trainable, total = run.policy.get("trainable"), run.policy.get("total")
    if trainable and total:
        found.append(Fact("parameters trained", percent(trainable / total), f"{trainable:,} of {total:,}"))
    if run.environment.get("finished") and run.environment.get("seconds"):
        found.append(Fact("training", duration(run.environment["seconds"]), str(run.environment.get("device", ""))))
    records = run.environment.get("data", {})
    if records.get("train"):
        skipped = f", {records['skipped']:,} skipped" if records.get("skipped") else ""
        found.append(
            Fact("training records", f"{records['train']:,}", f"{records.get('eval') or 0:,} for evaluation{skipped}")
        )
    return found


def _score_facts(score: Score) -> Iterator[Fact]:
    unit, baseline = score.any.unit, score.any.baseline
    if score.before and score.after:
        ends = f"from {amount(score.before.value, unit)} to {amount(score.after.value, unit)}"
        yield Fact("gain", f"{gain(score)} points", ends)
    if baseline is not None:
        yield Fact("majority answer", amount(baseline, unit), "by never looking")


def suites(run: Run, plots: Sequence[str]) -> list[Suite]:
    """One entry for every suite that was evaluated."""
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
    """A fair sample of the first suite's questions with their pictures; None when nothing was asked."""
    best = headline(run)
    items = questions(best[0]) if best else []
    if not items:
        return None
    chosen = sample(items, GALLERY_SIZE)
    uris = fitting([thumbnail(item.picture) for item in chosen], _PICTURES)
    cards = [Card(item, label(item.kind), uri or None) for item, uri in zip(chosen, uris, strict=True)]
    return Gallery(_how_chosen(chosen, items), cards)


def _how_chosen(chosen: Sequence[Question], items: Sequence[Question]) -> str:
    """What a reader must know to trust the gallery: the rule, and the share of right answers in it and in the whole."""
    words = f"All {len(items):,} test questions."
    if len(chosen) < len(items):
        words = (
            f"{len(chosen)} of the {len(items):,} test questions, chosen by rule and not by hand: sorted by type and "
            "outcome and taken at even distances, so that both have the shares they have in the whole test."
        )
    shown, whole = _share_right(chosen), _share_right(items)
    if shown is None or whole is None:
        return words
    return f"{words} Right after fine-tuning: {percent(shown)} of these, {percent(whole)} of all questions."


def _share_right(items: Sequence[Question]) -> float | None:
    right = [item.after.is_right for item in items if item.after]
    return sum(right) / len(right) if right else None


def versions(run: Run) -> list[tuple[str, str]]:
    """Machine and software, a row each."""
    known, git = run.environment, run.environment.get("git")
    if isinstance(git, Mapping):
        git = f"{str(git.get('commit'))[:12]}{', with local changes' if git.get('changed') else ''}"
    rows = [(name, known.get(name)) for name in ("device", "started", "finished", "seed", "base")]
    rows += [("milora-vl commit", git), *known.get("versions", {}).items()]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def credits_of(run: Run) -> list[str]:
    """Who made the pictures: the README.md beside the records, and beside or above pictures that were asked about."""
    path = (run.recipe.get("data") or {}).get("path") or []
    folders = [Path(entry["path"]).parent for entry in path] if isinstance(path, list) else [Path(path).parent]
    files = {line.get("image_file") for side in sides(run) for line in side.predictions[:50]}
    for file in sorted(str(file) for file in files if file):
        folders += [Path(file).parent, Path(file).parent.parent]
    return credit_lines(folder for folder in folders if folder.resolve() != run.folder.resolve())


def sides(run: Run) -> Iterator[Evaluation]:
    """Every evaluation that the page shows."""
    for comparison in run.comparisons:
        yield from (side for side in (comparison.before, comparison.after) if side)
