"""The parts of a report that are neither table nor plot: key figures, suites, gallery, commands, versions, credits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milora_data.page.credits import credit_lines
from milora_data.page.pictures import fitting, thumbnail
from milora_vl.reporting import gallery as gallery_of
from milora_vl.reporting.gallery import Question
from milora_vl.reporting.run_page import Evaluation, Run, Score, label
from milora_vl.reporting.tables import Table, score_tables
from milora_vl.reporting.wording import amount, duration, forgetting, gain, headline, percent

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
            outcomes=gallery_of.outcomes(gallery_of.questions(comparison)),
            tables=score_tables(comparison),
        )
        for comparison in run.comparisons
    ]


def gallery(run: Run) -> Gallery | None:
    """A fair sample of the first suite's questions with their pictures; None when nothing was asked."""
    best = headline(run)
    items = gallery_of.questions(best[0]) if best else []
    if not items:
        return None
    chosen = gallery_of.sample(items, GALLERY_SIZE)
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
    rows += [("resumed", _resumed(entry)) for entry in known.get("resumed", ())]
    rows += [("milora-vl commit", git), *known.get("versions", {}).items()]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _resumed(entry: Mapping[str, Any]) -> str:
    """One resumption in words, with what it changed.

    >>> _resumed({"from": "checkpoint-4", "at": "10:00", "changed": {"train.save_steps": [2.0, 1.0]}})
    '10:00 from checkpoint-4, with train.save_steps 2 -> 1'
    """
    values = {
        key: [f"{v:g}" if isinstance(v, float) else v for v in pair] for key, pair in entry.get("changed", {}).items()
    }
    changes = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in values.items())
    return f"{entry['at']} from {entry['from']}" + (f", with {changes}" if changes else "")


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
