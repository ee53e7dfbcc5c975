"""What a benchmark is: items to ask, a rule that scores one answer, a summary of all answers.

A new benchmark is one class with the four methods of `Benchmark` and one line in `suites.py`. Items carry everything
their scoring needs, so that stored answers can be scored again without the data and without a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from milora_data.errors import UserError
from milora_data.records import Turn


class MissingData(UserError):
    """The files of a benchmark are not where they were looked for; the message says how to get them."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question: the conversation up to it, its pictures (absolute paths) and what counts as right.

    `kind` is the question type, `group` what the error bars are clustered by (the picture, as a rule), `baseline` the
    value that a model which never looks would get on this item.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    kind: str = ""
    group: str = ""
    baseline: float | None = None
    meta: Mapping[str, object] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return self.turns[-1].text


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one item, and the value the benchmark gave it."""

    item: Item
    text: str
    value: float


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a benchmark with its standard error. A `fraction` is shown as percent, `points` as they are.

    `mean_of` says how it comes from the answers' values, for paired comparisons: their mean over the items (those of
    the type it is named after, else all), the mean over the types of each one's mean, or None (an F1, say).
    """

    name: str
    value: float
    stderr: float | None
    n: int
    baseline: float | None = None
    higher_is_better: bool = True
    note: str | None = None
    unit: Literal["fraction", "points"] = "fraction"
    mean_of: Literal["items", "types"] | None = None


class Benchmark(Protocol):
    """The four methods a benchmark needs; `protocol` names whose rules it follows and is stamped into every result."""

    name: str
    version: str
    protocol: str
    split: str
    max_new_tokens: int
    files: tuple[str, ...]  # what `load` reads, relative to the data folder; `ls` looks for them

    def load(self, data_dir: Path) -> list[Item]:
        """Read the items from a folder; MissingData (a UserError) when a file is not there."""
        ...

    def prompt(self, item: Item) -> tuple[Turn, ...]:
        """Return the conversation to show the model; its last turn is the user's."""
        ...

    def score(self, item: Item, text: str) -> float:
        """Return the value of one answer, 0.0 to 1.0."""
        ...

    def summarise(self, answers: Sequence[Answer]) -> list[Metric]:
        """Return the benchmark's numbers, the headline first."""
        ...
