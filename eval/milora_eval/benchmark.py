"""`Benchmark`, the base class: load items, make a prompt, score one answer, average with standard errors, upload.

A new benchmark is one class with `name`, `files` and the methods `load` and `score`; everything else has defaults.
Items carry everything that scoring needs, so stored answers can be scored again without the data and without a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from milora_data.keys import file_key, question_key, shown_keys
from milora_data.pictures.load import PictureFile
from milora_data.records.record import Turn, Video
from milora_eval.stats import clustered_stderr, mean, stratified_mean, stratified_stderr
from milora_vl.common.atomic_write import write_text
from milora_vl.common.errors import UserError, did_you_mean, suggest


class MissingData(UserError):
    """Raised when the files of a benchmark are missing; the hint says how to get them."""


# How turns become ids. exact: the template, pictures at `<image>`, nothing stripped (LLaVA's evaluation);
# training: as training encodes the same conversation; raw: the text of the last turn is the whole prompt.
Form = Literal["exact", "training", "raw"]


@dataclass(frozen=True, slots=True)
class Item:
    """One question: the conversation up to it, its pictures and videos (absolute paths) and the reference answers.

    `kind` is the question type. `group` is the cluster for the error bars, usually the picture (default: the item's
    own id). `baseline` is the score of a model that never looks at the picture. `source` names the question in errors,
    by its file and number, where a user wrote the file.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    kind: str = ""
    group: str = ""
    baseline: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = field(default="", compare=False)
    videos: tuple[Video, ...] = ()

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", self.id)

    @property
    def question(self) -> str:
        return self.turns[-1].text

    @property
    def asks_boxes(self) -> bool:
        return self.meta.get("metric") == "box"

    @property
    def plain_text(self) -> str:
        """The question without its `<image>` line, as in LLaVA's question files."""
        return self.question.removeprefix("<image>\n")


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to one item and its score; None if the answer alone cannot be scored."""

    item: Item
    text: str
    value: float | None

    @property
    def worth(self) -> float:
        return self.value or 0.0


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a benchmark with its standard error. A `fraction` is shown in percent, `points` unchanged.

    `mean_of` says how the number is computed from the values of the answers, for paired comparisons. "items": the mean
    over the items (of the type with this name, else all). "types": the mean of the means of the types. None: not a mean
    (for example an F1). It `counts` the score of each answer, or whether the answer mentions an accepted one. A
    `detail` appears in results.json but not in the table.
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
    counts: Literal["score", "mention"] = "score"

    @property
    def scale(self) -> float:
        """The factor between the value and the number that people see: fractions are shown in percent."""
        return 100.0 if self.unit == "fraction" else 1.0


class Upload(NamedTuple):
    """The file that a server or an official script reads: a list of objects, each with the id and text of an answer.

    `file` may contain {name} and {split} of the benchmark. `source` is the key of `Item.meta` with the id.
    """

    file: str
    id: str
    text: str
    source: str = "question_id"


class Benchmark:
    """The base class of all benchmarks. `protocol` names the scoring rules; every result stores it."""

    name = ""
    version = "1"
    protocols: tuple[str, ...] = ("official",)  # the first is the default
    split = "test"
    max_new_tokens = 128
    num_beams = 1
    form: Form = "exact"
    files: tuple[str, ...] = ()  # files that `load` reads, relative to the data folder; "a|b": the first that exists
    folders: tuple[str, ...] = ()  # other names for the subfolder of the data folder, besides the benchmark's name
    source = ""  # where the files come from, one line
    metric = "accuracy"
    details = ("", "")  # name and key of `Item.meta`: results.json also has the score of each value of this key
    upload: Upload | None = None
    origin = ""  # `module:Class` or `file.py:Class` of a benchmark that is not in the table of registry.py

    def __init__(self, protocol: str | None = None) -> None:
        self.protocol = protocol or self.protocols[0]
        if self.protocol not in self.protocols:
            message = (
                f'benchmark {self.name} has no protocol "{protocol}"; expected one of: {", ".join(self.protocols)}'
            )
            hint = did_you_mean(suggest(self.protocol, self.protocols)[:1])
            raise UserError(message, code="eval-unknown-protocol", hint=hint)

    def load(self, data_dir: Path) -> list[Item]:
        """Read the items from a folder. Raises MissingData (a UserError) if a file is missing."""
        raise NotImplementedError(f"benchmark {type(self).__name__} has no method load(data_dir)")

    def item(self, number: int, row: dict[str, Any]) -> Item:
        """Return the question of a row of VLMEvalKit's table, whose `picture` is a path."""
        raise NotImplementedError(f"benchmark {type(self).__name__} has no table")

    def recognises(self, question: Any) -> bool:
        """Return whether the first value in `files[0]`, which has a common name, is a question of this benchmark."""
        return True

    def prompt(self, item: Item) -> tuple[Turn, ...]:
        return item.turns

    def score(self, item: Item, text: str) -> float | None:
        """Return the value of one answer, 0.0 to 1.0; None if the answer alone does not determine it."""
        raise NotImplementedError(f"benchmark {type(self).__name__} has no method score(item, text)")

    def mentions(self, item: Item, text: str) -> float | None:
        """Return 1.0 if an answer mentions an accepted one, else 0.0; None if the score counts this anyway."""
        return None

    def mentioned(self, answers: Iterable[Answer]) -> list[Answer]:
        """Return the answers with the value of `mentions`, without those that have none."""
        found = ((answer, self.mentions(answer.item, answer.text)) for answer in answers)
        return [replace(answer, value=value) for answer, value in found if value is not None]

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the numbers, the headline first: the mean, then the mean of each type if there are several types."""
        answers = list(answers)
        label, key = self.details
        details = means(answers, "", kind_of=lambda answer: answer.item.meta[key], detail=True)[1:] if key else []
        return [
            *means(answers, self.metric),
            *(replace(each, name=f"{label}: {each.name}", mean_of=None) for each in details),
        ]

    def units(self, answers: Sequence[Answer]) -> Sequence[Answer]:
        """Return the answers that the headline averages, in the order of the items; several items can share one."""
        return answers

    def llava_question(self, item: Item) -> dict[str, Any]:
        """Return the item as a line of LLaVA's question files; question_id joins the answers to it."""
        line = {"question_id": item.meta.get("question_id", item.id), "text": item.plain_text}
        if item.images:
            line["image"] = item.meta.get("image", Path(item.images[0]).name)
        return line | {"category": item.kind or "default"}

    def uploaded(self, text: str) -> str:
        """Return an answer in the form that the server or the official script reads."""
        return text

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write files for the benchmark's server or official script, by default `upload`'s; return them."""
        if self.upload is None:
            return []
        file, number, text, source = self.upload
        rows = [{number: answer.item.meta[source], text: self.uploaded(answer.text)} for answer in answers]
        return [write_rows(folder / file.format(name=self.name, split=self.split), rows)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a JSON list of objects, or JSON lines if the name ends in .jsonl."""
    if path.suffix == ".jsonl":
        return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return write_text(path, json.dumps(rows, ensure_ascii=False))


def means(
    answers: Iterable[Answer],
    name: str,
    *,
    kind_of: Callable[[Answer], str] = lambda answer: answer.item.kind,
    detail: bool = False,
) -> list[Metric]:
    """Return the mean value of all answers, then of each type if there are several.

    Answers without a value are skipped; [] if none has a value.
    """
    scored = [answer for answer in answers if answer.value is not None]
    if not scored:
        return []
    by_kind = grouped(scored, kind_of)
    of_kinds = sorted(by_kind.items()) if len(by_kind) > 1 else []
    return [mean_of_items(name, scored), *(mean_of_items(kind, part, detail=detail) for kind, part in of_kinds)]


def means_of_types(answers: Iterable[Answer], name: str) -> list[Metric]:
    """Return the mean over the types of their means, then the mean of each type; standard errors are clustered."""
    scored = [answer for answer in answers if answer.value is not None]
    if not scored:
        return []
    values, kinds = [answer.worth for answer in scored], [answer.item.kind for answer in scored]
    of_kinds = [mean_of_items(kind, part) for kind, part in sorted(grouped(scored).items())]
    baselines = [metric.baseline for metric in of_kinds if metric.baseline is not None]
    baseline = mean(baselines) if len(baselines) == len(of_kinds) else None
    stderr = stratified_stderr(values, kinds, [answer.item.group for answer in scored])
    headline = Metric(name, stratified_mean(values, kinds), stderr, len(scored), baseline, mean_of="types")
    return [headline, *of_kinds]


def mean_of_items(name: str, answers: Sequence[Answer], *, detail: bool = False) -> Metric:
    values = [answer.worth for answer in answers]
    stderr = clustered_stderr(values, [answer.item.group for answer in answers])
    baselines = [answer.item.baseline for answer in answers if answer.item.baseline is not None]
    baseline = mean(baselines) if len(baselines) == len(values) else None
    return Metric(name, mean(values), stderr, len(values), baseline, mean_of="items", detail=detail)


def grouped(
    answers: Iterable[Answer], key: Callable[[Answer], Hashable] = lambda answer: answer.item.kind
) -> dict[Any, list[Answer]]:
    """Return the answers by a key (default: the type of the question), in the order in which the keys appear."""
    groups: dict[Any, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(key(answer), []).append(answer)
    return groups


def content_of(item: Item, read: Callable[[PictureFile], str | None] = file_key) -> list[Any]:
    """Return what identifies the pictures and videos of an item; `read` returns the key of each file."""
    return [*map(read, item.images), *shown_keys((), item.videos, read)]


def key_of_question(benchmark: Benchmark, item: Item, content: Sequence[Any]) -> str:
    """Return the key of a question: its prompt, answers, type and metric, and the content of pictures and videos.

    Only where the file of a picture or video is missing, the id of the question is part of it.
    """
    has_all = all(each is not None and (isinstance(each, str) or each[0] is not None) for each in content)
    rest = [item.kind, item.meta.get("metric"), None if has_all else item.id]
    return question_key(benchmark.prompt(item), content, item.answers, rest)
