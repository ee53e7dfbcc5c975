"""A user's own benchmark as a data file: records of training data, or rows with image, question, answer and a metric.

`--benchmarks my.json` reads both, as a JSON list or as JSON lines. Pictures are searched for next to the file, in
`images` and in `--data`. Each row may name a `metric`; the default compares answers after a light normalisation.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from milora_data.keys import KeyOf, data_key, digest, file_key
from milora_data.pictures.load import Picture, refusal
from milora_data.records import identifier_of, parse_record
from milora_data.records.boxes import boxes_in, with_pixels
from milora_data.records.record import IMAGE, VIDEO
from milora_eval.benchmark import (
    Answer,
    Benchmark,
    Form,
    Item,
    Metric,
    MissingData,
    content_of,
    key_of_question,
    mean_of_items,
    means,
)
from milora_eval.benchmarks.short_answers import FIRST_LINE, anls, chartqa_correct, exact_match, in_first_line
from milora_eval.benchmarks.short_answers import normalise as light_form
from milora_eval.benchmarks.vqa import clean, leave_one_out, m4c_normalise, normalise
from milora_eval.data_files import json_values
from milora_vl.common.cli.web import url_problem
from milora_vl.common.errors import DataError, Problem, UserError, beside, collected, did_you_mean, suggest


def yes_or_no(text: str) -> str:
    """Return the first yes or no of a text in any case; empty without one.

    >>> yes_or_no("YES!"), yes_or_no("No, it is not."), yes_or_no("nothing")
    ('yes', 'no', '')
    """
    found = re.search(r"\b(yes|no)\b", text.lower())
    return found[1] if found else ""


def vqa(text: str, answers: Sequence[str]) -> float:
    """Return VQA's accuracy. Three annotators must agree with an answer; of fewer than four, one is enough.

    Unlike the official script, it normalises the texts also where all annotators agree.

    >>> vqa("Red.", ["red"]), vqa("red", ["red", "red", "blue", "blue"])
    (1.0, 0.5)
    """
    said, references = normalise(clean(text)), [normalise(clean(answer)) for answer in answers]
    return leave_one_out(said, references) if len(references) > 3 else float(said in references)


BOX = re.compile(r"\[(-?[0-9.]+), (-?[0-9.]+), (-?[0-9.]+), (-?[0-9.]+)\]")


def box(text: str, answers: Sequence[str]) -> float:
    """Return whether the first box of a text has an IoU of at least 0.5 with an answer's, both in pixels of the file.

    It is accuracy@0.5, the rule for RefCOCO in Qwen-VL's evaluate_grounding.py.

    >>> box("At [0, 0, 10, 10].", ["[0, 0, 10, 20]"]), box("At [0, 0, 9, 10].", ["[0, 0, 10, 20]"])
    (1.0, 0.0)
    """
    found = BOX.search(text)
    return float(found is not None and any(_iou(found, other) >= 0.5 for other in map(BOX.search, answers) if other))


def _iou(*boxes: re.Match[str]) -> float:
    lefts, tops, rights, bottoms = zip(*(map(float, each.groups()) for each in boxes), strict=True)
    shared = max(min(rights) - max(lefts), 0) * max(min(bottoms) - max(tops), 0)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in zip(lefts, tops, rights, bottoms, strict=True)]
    return shared / (sum(areas) - shared) if shared else 0.0


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": lambda text, answers: float(exact_match(text, answers)),
    "equal": lambda text, answers: float(text in answers),
    "contains": lambda text, answers: float(any(answer.lower() in text.lower() for answer in answers)),
    "yes_no": lambda text, answers: float(yes_or_no(text) in map(yes_or_no, answers)),
    "vqa": vqa,
    "m4c": lambda text, answers: float(m4c_normalise(text) in map(m4c_normalise, answers)),
    "anls": anls,
    "box": box,
    "relaxed": lambda text, answers: max(float(chartqa_correct(text, answer)) for answer in answers),
}
EQUALITIES = ("exact", "equal", "m4c")  # an answer in a sentence is wrong for them
LENIENT = "answer in first line"
# All others count right answers.
NAMES = {"vqa": "VQA accuracy", "anls": "ANLS", "relaxed": "relaxed accuracy", "box": "accuracy at IoU 0.5"}


class OwnData(Benchmark):
    """Questions from one file. Stored answers name it `data:NAME` and hold the metric of each question.

    The name is the file's; `registry.choose` changes it where another file of a run has it.
    """

    protocols = ("own data",)
    split = "own"
    form: Form = "training"

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.path = None if spec.startswith("data:") else Path(spec)
        self.rename(spec.removeprefix("data:") if self.path is None else self.path.stem)
        if Path(self.name).name != self.name:  # stored answers may come from anybody, and it names folders
            hint = "rename the file: its name without extension names the folder of the results"
            raise UserError(f"{spec!r:.80} is no name of a benchmark", where="--benchmarks", hint=hint)

    def rename(self, name: str) -> None:
        self.name, self.origin = name, f"data:{name}"

    def file(self, data_dir: Path) -> Path:
        """Return the file of the questions, or if it does not exist the file of that name in the data folder."""
        if self.path is None:
            hint = "name the file: --benchmarks FILE.json"
            raise UserError(f"{self.origin} does not name the file with its questions", where="--benchmarks", hint=hint)
        path = self.path if self.path.is_file() else data_dir / self.path
        if not path.is_file():
            problem = url_problem(self.path)
            if problem is not None:
                raise UserError(problems=[problem])
            message = f"no file {self.path}, and no file of that name in {data_dir}"
            raise MissingData(message, code="data-missing-file", hint=beside(self.path))
        return path

    def identity(self, data_dir: Path) -> dict[str, str | None]:
        """Return the path of the file and the key of its questions, by which a run knows whose answers it has."""
        items, read = self.load(data_dir), cache(file_key)
        keys = [key_of_question(self, item, content_of(item, read)) for item in items]
        return {"file": str(self.file(data_dir).resolve()), "hash": data_key(sorted(keys))}

    def is_one_of(self, files: Sequence[Mapping[str, str | None]], data_dir: Path) -> bool:
        own = self.identity(data_dir)
        return any(own["file"] == each["file"] or own["hash"] == each["hash"] for each in files)

    def load(self, data_dir: Path) -> list[Item]:
        items = read_questions(self.file(data_dir), data_dir)
        said: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # an answer to a type: how it is spelt
        for item in items:
            form = yes_or_no if item.meta["metric"] == "yes_no" else light_form
            said[item.kind, form(item.answers[0])][item.answers[0]] += 1
        rising = sorted(said, key=lambda answer: (said[answer].total(), answer))
        frequent = {answer[0]: min(said[answer], key=lambda text: (-said[answer][text], text)) for answer in rising}
        return [replace(item, baseline=self.score(item, frequent[item.kind])) for item in items]

    def score(self, item: Item, text: str) -> float:
        return METRICS[item.meta["metric"]](text, item.answers)

    def mentions(self, item: Item, text: str) -> float | None:
        return float(in_first_line(text, item.answers)) if item.meta["metric"] in EQUALITIES else None

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        answers = list(answers)
        lenient = self.mentioned(answers)
        rows = [mean_of_items(LENIENT, lenient)] if lenient else []
        rows = [replace(row, baseline=None, note=FIRST_LINE, counts="mention") for row in rows]
        names = {NAMES.get(each.item.meta["metric"], self.metric) for each in answers}
        return [*means(answers, names.pop() if len(names) == 1 else "mean score"), *rows]


def read_questions(path: Path, data_dir: Path) -> list[Item]:
    """Return the questions of a file. Raises DataError that names every mistake in it.

    Training data may use one id for several records; the number of the record makes the id unique.
    """
    items: list[Item] = []
    problems: list[Problem] = []
    read = cache(file_key)
    for number, row in enumerate(json_values(path), start=1):
        with collected(problems):
            items.append(_item(row, number, path, data_dir, read))
    if problems:
        raise DataError(problems=problems)
    times = Counter(item.id for item in items)
    return [
        replace(item, id=f"{item.id}#{number}") if times[item.id] > 1 else item
        for number, item in enumerate(items, start=1)
    ]


def _item(row: Any, number: int, path: Path, data_dir: Path, read: KeyOf) -> Item:
    where = f"{path}, question {number}"
    if not isinstance(row, dict):
        raise DataError(f"expected an object, got {type(row).__name__}", where=where)
    is_record = any(key in row for key in ("conversations", "messages", "completion", "query"))
    record = parse_record(row if is_record else _as_record(row, where), source=where)
    turns, answers = record.turns, row.get("answers", row.get("answer"))
    if any(turn.keys or turn.role == "tools" for turn in turns):
        raise DataError("calls of tools are not scored", code="record-tools", where=where, hint="remove the record")
    answers = answers if isinstance(answers, list) else [] if answers is None else [answers]
    if turns and turns[-1].role == "assistant":
        turns, answers = turns[:-1], answers if row.get("answers") else [turns[-1].text]
    if not turns or turns[-1].role != "user":
        roles = ", ".join(turn.role for turn in record.turns) or "none"
        message = f"no turn of the user before the answer; the turns: {roles}"
        hint = "end the conversation with a question of the user, and its answer"
        raise DataError(message, where=where, hint=hint)
    if not answers:
        raise DataError("no answer to compare with", where=where, hint='add "answer" to the question')
    boxes = any(True for _ in boxes_in(map(str, answers)))
    answers, metric = [with_pixels(str(answer)) for answer in answers], row.get("metric", "box" if boxes else "exact")
    if metric not in METRICS:
        message = f'unknown metric "{metric}"; expected one of: {", ".join(METRICS)}'
        hint = did_you_mean(suggest(str(metric), METRICS)[:1])
        raise DataError(message, code="own-data-unknown-metric", where=where, hint=hint)
    if (boxes or metric == "box") and not (
        metric == "box" and len(record.images) == 1 and all(len(BOX.findall(answer)) == 1 for answer in answers)
    ):
        message = f"boxes need the metric box, one picture, and one box in each answer, got {answers!r:.80}"
        raise DataError(message, code="record-box", where=where, hint="write a box as [x1, y1, x2, y2]")
    if metric == "yes_no" and not all(map(yes_or_no, answers)):
        raise DataError(f"the metric yes_no needs the answer yes or no, got {answers!r:.80}", where=where)
    if any(file.content for file in record.files):
        problems = refusal(f"{path}:{number}").problems
        raise DataError(problems=[replace(problem, where=where) for problem in problems])
    record = record.with_files(lambda file: _found(file, path.parent, data_dir, where))
    return Item(
        id=identifier_of(row, ("id", "question_id"), number),
        turns=turns,
        images=tuple(map(str, record.images)),
        videos=record.videos,
        answers=tuple(answers),
        kind=str(row.get("type") or row.get("category") or ""),
        group=next(filter(None, map(read, record.files)), None) or digest([turn.text for turn in turns]),
        meta={"metric": metric},
        source=where,
    )


def _as_record(row: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(row.get("question"), str):
        raise DataError(f'no text under "question"; its keys: {", ".join(map(str, row)) or "none"}', where=where)
    value = row.get("images") or row.get("image") or []
    images = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in images):
        message = f'"image" must be a file name or a list of file names, got {str(value)[:80]}'
        raise DataError(message, where=where)
    shown = {key: row[key] for key in ("video", "videos", "tools") if row.get(key)}
    videos = parse_record({"conversations": [], **shown}, source=where).videos
    text = row["question"]
    for mark, number in ((VIDEO, len(videos)), (IMAGE, len(images))):
        text = text if mark in text else f"{mark}\n" * number + text
    return {"conversations": [{"from": "human", "value": text}], "image": images, **shown}


def _found(file: Picture, beside: Path, data_dir: Path, row: str) -> Picture:
    below = (file.within(folder).path for folder in (beside, beside / "images", data_dir))
    paths = [path.absolute() for path in below if path is not None]
    if not paths:
        message, hint = f"{file} is outside the folders of the pictures", "use:  --data FOLDER (it may be /)"
        raise DataError(message, code="image-outside-folder", where=row, hint=hint)
    path = next((path for path in paths if path.is_file()), paths[-1])  # else the folder of --data
    return Picture(file.name, path)
