"""The pictures of a report: which questions to show (a fair sample, never a choice), with both models' answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from milora_vl.reporting.run_page import Comparison, Json


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
