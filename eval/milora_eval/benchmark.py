"""What a benchmark is: items to ask, a rule that scores one answer, a summary of all answers.

A new benchmark is one class with `name`, `files` and the methods `load` and `score`; the rest has defaults. Items carry
everything their scoring needs, so that stored answers can be scored again without the data and without a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from milora_data.command import suggest
from milora_data.errors import UserError
from milora_data.records import Turn
from milora_eval.stats import clustered_stderr, mean


class MissingData(UserError):
    """The files of a benchmark are not where they were looked for; the message says how to get them."""


# How turns become ids. exact: the template, pictures where `<image>` stands, nothing stripped (LLaVA's evaluation);
# training: as training encodes the same conversation; raw: the text of the last turn is the whole prompt.
Form = Literal["exact", "training", "raw"]


@dataclass(frozen=True, slots=True)
class Item:
    """One question: the conversation up to it, its pictures (absolute paths) and what counts as right.

    `kind` is the question type, `group` what the error bars are clustered by (the picture, as a rule; without one the
    item stands alone), `baseline` the value that a model which never looks would get on this item.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    kind: str = ""
    group: str = ""
    baseline: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", self.id)

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return self.turns[-1].text


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one item, and the value the benchmark gave it: None where nothing here can tell.

    `judgement` is what a judge said to the answer, where a benchmark needs one.
    """

    item: Item
    text: str
    value: float | None
    judgement: str | None = None

    @property
    def worth(self) -> float:
        """The value, 0.0 where there is none."""
        return self.value or 0.0


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a benchmark with its standard error. A `fraction` is shown as percent, `points` as they are.

    `mean_of` says how it comes from the answers' values, for paired comparisons: their mean over the items (those of
    the type it is named after, else all), the mean over the types of each one's mean, or None (an F1, say).
    A `detail` stands in results.json and not in the table.
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
    detail: bool = False


class Benchmark:
    """The base of all benchmarks. `protocol` names whose rules it follows and is stamped into every result."""

    name = ""
    version = "1"
    protocols: tuple[str, ...] = ("official",)  # the first is the default
    split = "test"
    max_new_tokens = 128
    num_beams = 1
    form: Form = "exact"
    files: tuple[str, ...] = ()  # what `load` reads, relative to the data folder; "a|b": the first that is there
    folders: tuple[str, ...] = ()  # names of the data folder's subfolder, beside the benchmark's own name
    source = ""  # where the files come from, one line
    metric = "accuracy"
    can_resample = True  # whether the numbers of some pictures drawn twice mean something, and are had fast
    judge = ""  # the model that grades the answers, for benchmarks that need one
    judge_system = ""  # the system message it is given
    origin = ""  # `module:Class` or `file.py:Class` of one that is not in the table of suites.py

    def __init__(self, protocol: str | None = None) -> None:
        """Raises UserError for a protocol that this benchmark does not have."""
        if protocol is not None and protocol not in self.protocols:
            near = suggest(protocol, self.protocols)
            hint = f"\ndid you mean {near[0]} ?" if near else ""
            known = ", ".join(self.protocols)
            raise UserError(f'benchmark {self.name} has no protocol "{protocol}"; expected one of: {known}{hint}')
        self.protocol = protocol or self.protocols[0]

    def load(self, data_dir: Path) -> list[Item]:
        """Read the items from a folder; MissingData (a UserError) when a file is not there."""
        raise NotImplementedError(f"benchmark {type(self).__name__} has no method load(data_dir)")

    def prompt(self, item: Item) -> tuple[Turn, ...]:
        """Return the conversation to show the model; its last turn is the user's."""
        return item.turns

    def score(self, item: Item, text: str) -> float | None:
        """Return the value of one answer, 0.0 to 1.0; None where it cannot be told from the answer alone."""
        raise NotImplementedError(f"benchmark {type(self).__name__} has no method score(item, text)")

    def grade(self, item: Item, judgement: str) -> float | None:
        """Return the value of an answer from what the judge said to it."""
        return None

    def judge_prompt(self, item: Item, text: str) -> str:
        """Return what the judge is asked about an answer."""
        raise NotImplementedError(f"benchmark {self.name} has no judge")

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the benchmark's numbers, the headline first: the mean, and that of each type if there are several."""
        return means(answers, self.metric)

    def units(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """Return what the headline is the mean of, in the order of the items: the answers, or one for several."""
        return answers

    def llava_question(self, item: Item) -> dict[str, Any]:
        """Return the item as a line of LLaVA's question files; answers are joined by its question_id."""
        line = {"question_id": item.meta.get("question_id", item.id), "text": plain_text(item)}
        if item.images:
            line["image"] = item.meta.get("image", Path(item.images[0]).name)
        return line | {"category": item.kind or "default"}

    def llava_keys(self, item: Item) -> tuple[Any, ...]:
        """Return by which keys a line of LLaVA's answers may belong to the item; see `llava_key`."""
        return (str(item.meta.get("question_id", item.id)),)

    def llava_key(self, line: Mapping[str, Any]) -> Any:
        """Return the key of a line of LLaVA's answers file (question_id, prompt, text)."""
        return str(line["question_id"])

    def submission(self, answers: Collection[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write what the benchmark's server or official script reads, validated; return the files, none by default."""
        return []


def plain_text(item: Item) -> str:
    """Return the question without the mark of its picture, as in LLaVA's question files."""
    return item.question.removeprefix("<image>\n")


def means(answers: Iterable[Answer], name: str, *, detail: bool = False) -> list[Metric]:
    """Return the mean value of all answers, then of each type; answers without a value are left out.

    Reads `answers` once and keeps two numbers of each, so that a million take little memory.
    """
    tally = Tally()
    for answer in answers:
        if answer.value is not None:
            tally.add(answer.value, answer.item.kind, answer.item.group)
    return tally.metrics(name, detail=detail)


class Tally:
    """Values with their types and groups, kept as plain numbers."""

    def __init__(self) -> None:
        from array import array

        self.values, self.kinds, self.groups = array("d"), array("l"), array("l")
        self._kinds: dict[str, int] = {}
        self._groups: dict[str, int] = {}

    def add(self, value: float, kind: str, group: str) -> None:
        """Add one value."""
        self.values.append(value)
        self.kinds.append(self._kinds.setdefault(kind, len(self._kinds)))
        self.groups.append(self._groups.setdefault(group, len(self._groups)))

    def metrics(self, name: str, *, detail: bool = False) -> list[Metric]:
        """Return the mean of everything under `name`, and of each type where there are several; [] for no values."""
        if not self.values:
            return []
        found = [_mean_metric(name, self.values, self.groups)]
        if len(self._kinds) > 1:
            for kind, number in sorted(self._kinds.items()):
                places = [place for place, other in enumerate(self.kinds) if other == number]
                values, groups = [self.values[i] for i in places], [self.groups[i] for i in places]
                found.append(_mean_metric(kind, values, groups, detail=detail))
        return found


def _mean_metric(name: str, values: Any, groups: Any, *, detail: bool = False) -> Metric:
    stderr = clustered_stderr(values, groups)
    return Metric(name, mean(values), stderr, len(values), mean_of="items", detail=detail)
