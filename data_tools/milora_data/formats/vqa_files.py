"""Convert the files of well-known VQA data sets to LLaVA records, with the prompts of LLaVA-1.5's mix665k.

VQAv2, OK-VQA, GQA, VizWiz, TextVQA, OCR-VQA: all questions about one picture form one conversation; the first question
includes the answer format. A-OKVQA and ScienceQA: multiple choice, answered by a letter. Pictures are not copied; their
names are the names of the original downloads, or follow `image_pattern`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_data.records.record import IMAGE
from milora_vl.common.cli.command_line import amount
from milora_vl.common.errors import DataError

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a conversion."""

    prompt: str | None = None  # question for a picture that has only a caption
    split: str = "train"  # split to convert, if a file contains all splits
    image_pattern: str | None = None  # file name of a picture from its id, such as coco/train2017/{:012d}.jpg
    kept: str | None = None  # a column or key that the records keep
    left_out: list[str] = field(default_factory=list)  # collects a line for each record that is skipped

    def leave_out(self, error: DataError) -> None:
        """Skip the record of an error."""
        self.left_out.append(f"{error.first.where}: {error.first.message}")

    def with_kept(self, converted: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record with what it keeps of its row. Raises `DataError` for a row without it."""
        if self.kept is None:
            return converted
        return {self.kept: field_of({**row, **converted}, self.kept), **converted}

    def image(self, identifier: Any, default: str) -> str:
        """Return the file name of a picture; raises `DataError` if the pattern does not fit its id."""
        pattern = self.image_pattern or default
        try:
            return pattern.format(int(identifier) if str(identifier).isdecimal() and "d}" in pattern else identifier)
        except (ValueError, IndexError, KeyError) as error:
            raise DataError(
                f"--image_pattern {pattern} does not fit the picture {identifier!r}: {error}",
                code="convert-image-pattern",
                hint="for example  --image_pattern '{:012d}.jpg'",
            ) from None


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field that every record must have. Raises `DataError` with the names of its fields."""
    if row.get(name) in (None, ""):
        raise DataError(
            f'record {row.get("id", "")} has nothing under "{name}"; it has: {", ".join(row)}',
            code="hold-out-unknown-field",
            where="--hold_out_by",
            hint="name a field that every record has, or picture or record",
        )
    return row[name]


Records = Iterator[dict[str, Any]]
Converter = Callable[[Sequence[Path], Options], Records]


def record(identifier: Any, image: str | None, exchanges: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return a LLaVA record of questions and answers, with `<image>` before the first question if it has a picture."""
    turns = []
    for question, answer in exchanges:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if image is None:
        return {"id": str(identifier), "conversations": turns}
    turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
    return {"id": str(identifier), "image": image, "conversations": turns}


def vqa(sources: Sequence[Path], options: Options) -> Records:
    """VQAv2 and OK-VQA: the questions file and the annotations file, in any order."""
    files = {key: content for path in sources for key, content in _keyed(path, ("questions", "annotations")).items()}
    if not {"questions", "annotations"} <= set(files):
        raise DataError(
            f'expected a file with "questions" and one with "annotations"; found: {", ".join(files) or "none"}',
            code="convert-missing-input",
        )
    answers = {row["question_id"]: _vqa_answer(row) for row in files["annotations"]}
    subtype = files.get("data_subtype", "train2014")
    rows = [
        (row["image_id"], row["question"], answers[row["question_id"]])
        for row in files["questions"]
        if row["question_id"] in answers
    ]
    if num_unanswered := len(files["questions"]) - len(rows):
        sys.stderr.write(f"left out: {amount(num_unanswered, 'question')} without an annotation\n")
    yield from _by_picture(rows, options, f"COCO_{subtype}_{{:012d}}.jpg", SHORT)


def gqa(sources: Sequence[Path], options: Options) -> Records:
    """GQA: {question id: {"imageId", "question", "answer"}}."""
    rows = [(row["imageId"], row["question"], row["answer"]) for path in sources for row in read_json(path).values()]
    yield from _by_picture(rows, options, "{}.jpg", SHORT)


def textvqa(sources: Sequence[Path], options: Options) -> Records:
    """TextVQA: {"data": [{"image_id", "question", "answers": [...]}]}."""
    entries = [row for path in sources for row in read_json(path)["data"]]
    rows = [(row["image_id"], row["question"], most_frequent(row["answers"])) for row in entries]
    yield from _by_picture(rows, options, "{}.jpg", SHORT)


def vizwiz(sources: Sequence[Path], options: Options) -> Records:
    """VizWiz: [{"image", "question", "answers": [{"answer"}]}]."""
    entries = [row for path in sources for row in read_json(path)]
    rows = [(row["image"], row["question"], most_frequent(a["answer"] for a in row["answers"])) for row in entries]
    rows = [(image, question, _capital(answer, "unanswerable")) for image, question, answer in rows]
    yield from _by_picture(rows, options, "{}", f"{UNANSWERABLE}\n{SHORT}")


def ocrvqa(sources: Sequence[Path], options: Options) -> Records:
    """OCR-VQA: {picture id: {"questions", "answers", "split": 1 train, 2 validation, 3 test}}."""
    wanted = {"train": 1, "val": 2, "validation": 2, "test": 3}.get(options.split)
    for path in sources:
        for identifier, row in read_json(path).items():
            if row.get("split", wanted) == wanted and row["questions"]:
                image = options.image(identifier, "{}.jpg")
                yield record(
                    identifier, image, _with_answer_format(zip(row["questions"], row["answers"], strict=True), SHORT)
                )


def aokvqa(sources: Sequence[Path], options: Options) -> Records:
    """A-OKVQA: [{"question_id", "image_id", "question", "choices", "correct_choice_idx"}]."""
    for path in sources:
        for row in read_json(path):
            question = f"{with_choices(row['question'], row['choices'])}\n{LETTER}"
            image = options.image(row["image_id"], "{:012d}.jpg")
            yield record(row["question_id"], image, [(question, LETTERS[row["correct_choice_idx"]])])


def scienceqa(sources: Sequence[Path], options: Options) -> Records:
    """ScienceQA: problems.json, {id: {"question", "choices", "answer", "hint", "image", "split"}}."""
    for path in sources:
        for identifier, row in read_json(path).items():
            if row.get("split", options.split) != options.split:
                continue
            hint = f"{row['hint']}\n" if row.get("hint") else ""
            question = f"{hint}{with_choices(row['question'], row['choices'])}\n{LETTER}"
            image = options.image(identifier, f"{options.split}/{{}}/{row['image']}") if row.get("image") else None
            yield record(identifier, image, [(question, LETTERS[row["answer"]])])


def with_choices(question: str, choices: Sequence[str]) -> str:
    """Return a question with one line per choice: its letter, then its text.

    >>> with_choices("Which?", ["this", "that"])
    'Which?\\nA. this\\nB. that'
    """
    return "\n".join([question, *(f"{LETTERS[n]}. {choice}" for n, choice in enumerate(choices))])


def most_frequent(answers: Iterable[str]) -> str:
    """Return the most frequent answer; of equally frequent answers, the first.

    >>> most_frequent(["red", "blue", "blue", "red"])
    'red'
    """
    return Counter(answers).most_common(1)[0][0]


def _vqa_answer(row: Mapping[str, Any]) -> str:
    if "multiple_choice_answer" in row:
        return str(row["multiple_choice_answer"])
    return most_frequent(answer["answer"] for answer in row["answers"])


def _keyed(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(
            f"expected an object with {' or '.join(keys)}, got a {type(content).__name__}",
            code="convert-wrong-format",
            where=str(path),
        )
    return {key: content[key] for key in (*keys, "data_subtype") if key in content}


def _by_picture(rows: Iterable[tuple[Any, str, str]], options: Options, default: str, answer_format: str) -> Records:
    by_picture: dict[Any, list[tuple[str, str]]] = {}
    for identifier, question, answer in rows:
        by_picture.setdefault(identifier, []).append((question, answer))
    for identifier, exchanges in by_picture.items():
        yield record(identifier, options.image(identifier, default), _with_answer_format(exchanges, answer_format))


def _with_answer_format(exchanges: Iterable[tuple[str, str]], answer_format: str) -> list[tuple[str, str]]:
    """Append the answer format ("Answer the question using ...") to the first question."""
    (question, answer), *others = exchanges
    return [(f"{question}\n{answer_format}", answer), *others]


def _capital(answer: str, word: str) -> str:
    return answer.capitalize() if answer.strip().lower() == word else answer
