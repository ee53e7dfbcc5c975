"""Convert rows of tables to records: instructions, questions about pictures, captions.

Instructions have the fields of Stanford Alpaca and AGI-Edgerunners/LLM-Adapters, or of MetaMathQA; `system` and
`history` are as in LLaMA-Factory's form of Alpaca. Pictures are not copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from milora_data.records import earlier, identifier_of
from milora_data.records.record import IMAGE
from milora_vl.common.errors import DataError

DEFAULT_PROMPT = "Describe this picture."
Columns = Mapping[str, tuple[str, ...]]
COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("image", "image_path", "file_name", "filename", "file", "path", "images"),
    "question": ("question", "query", "instruction", "prompt", "problem"),
    "answer": ("answer", "answers", "response", "output", "label", "multiple_choice_answer", "solution"),
    "caption": ("caption", "text", "description", "captions"),
    "input": ("input",),
    "system": ("system", "system_prompt"),
    "split": ("split",),
}
EMPTY_CELL = "table-empty-cell"


@dataclass(frozen=True, slots=True)
class TableOptions:
    prompt: str | None = None  # question for a picture that has only a caption
    kept: str | None = None  # a column or key that the records keep
    columns: Columns = field(default_factory=lambda: COLUMNS)  # the names of each part of a record
    unused: set[str] = field(default_factory=set)  # columns that no row has had, and --prompt
    split: str | None = None  # of the rows that are wanted
    splits: set[str] = field(default_factory=set)  # collects the splits of all rows
    left_out: list[str] = field(default_factory=list)  # collects a line for each record that is skipped

    def wants(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is of the split, and note its columns. Raises `DataError` if it says nothing of it."""
        self.unused.difference_update(row)
        if self.split is None:
            return True
        name = self.columns["split"][0]
        if row.get(name) in (None, ""):
            hint = "name the column:  --columns split=COLUMN"
            raise DataError(f'nothing under "{name}"; columns: {", ".join(row)}', where="--split", hint=hint)
        self.splits.add(str(row[name]))
        return str(row[name]) == self.split

    def leave_out(self, error: DataError) -> None:
        self.left_out.append(f"{error.first.where}: {error.first.message}")

    def with_kept(self, converted: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record with what it keeps of its row. Raises `DataError` for a row without it."""
        if self.kept is None:
            return converted
        return {self.kept: field_of({**row, **converted}, self.kept), **converted}


Records = Iterator[dict[str, Any]]


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field that every record must have. Raises `DataError` with the names of its fields."""
    if row.get(name) in (None, ""):
        raise DataError(
            f'record {row.get("id", "")} has nothing under "{name}"; it has: {", ".join(row)}',
            where="--hold_out_by",
            hint="name a field that every record has, or picture or record",
        )
    return row[name]


def record(identifier: Any, images: Any, exchanges: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return a LLaVA record of questions and answers, with an `<image>` for each picture before the first question."""
    turns = []
    for question, answer in exchanges:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if not images:
        return {"id": str(identifier), "conversations": turns}
    names = images if isinstance(images, list) else [images]
    turns[0]["value"] = f"{IMAGE}\n" * len(names) + turns[0]["value"]
    return {"id": str(identifier), "image": names[0] if len(names) == 1 else names, "conversations": turns}


def is_record(row: Mapping[str, Any]) -> bool:
    """Return whether a row is a record or a dialogue, as training reads them, and not the row of a table."""
    pairs = (("prompt", "completion"), ("query", "response"))  # TRL, ms-swift
    return "conversations" in row or "messages" in row or any(row.keys() >= set(pair) for pair in pairs)


def row_record(row: Mapping[str, Any], options: TableOptions, *, place: str, identifier: str) -> dict[str, Any]:
    """Return the record of one row, whose columns are recognized by name.

    `input` follows the question on a new line, or is the question; the text of `system` and the exchanges of `history`
    come first. The texts of a row without a picture are not changed. Raises `DataError` with the code EMPTY_CELL if the
    row has the columns, but no text in one; else if it lacks them.
    """
    columns = options.columns
    cells = {
        what: next((row[name] for name in names if row.get(name) not in (None, "", [])), None)
        for what, names in columns.items()
    }
    answer = cells["answer"] if cells["question"] else cells["caption"] or cells["answer"]
    if isinstance(answer, list | tuple):
        answer = most_frequent(answer)
    if isinstance(answer, int | float):
        answer = str(answer)
    asks_nothing = cells["caption"] or not any(name in row for name in columns["question"])  # a picture to describe
    asked = cells["question"] or cells["input"] or (cells["image"] if asks_nothing else None)
    if not isinstance(answer, str) or not answer.strip() or not asked:
        raise _incomplete(row, columns, answer, bool(asked), place)
    question = "\n".join(filter(None, (str(cells["question"] or ""), str(cells["input"] or ""))))
    if not question:
        options.unused.discard("--prompt")
    if cells["image"]:
        question = (question or options.prompt or DEFAULT_PROMPT).replace(IMAGE, "").strip()
        answer = answer.strip()
    # What an evaluation reads: the kind of the question, and all correct answers.
    kept: dict[str, Any] = {"type": row["type"]} if row.get("type") else {}
    kept |= {"answers": list(map(_text_of, cells["answer"]))} if isinstance(cells["answer"], list) else {}
    exchanges = [*earlier(row, place), (question, answer)]
    converted = record(identifier_of(row, ("id", "question_id"), identifier), cells["image"], exchanges)
    if cells["system"]:
        converted["conversations"].insert(0, {"from": "system", "value": str(cells["system"])})
    return options.with_kept({**kept, **converted}, row)


def _incomplete(row: Mapping[str, Any], columns: Columns, answer: object, is_asked: bool, place: str) -> DataError:
    found = {what: next((name for name in names if name in row), "") for what, names in columns.items()}
    question = found["question"] or found["input"] or found["image"]
    text = found["answer"] if found["question"] else found["caption"] or found["answer"]
    if question and text and (not answer or isinstance(answer, str)):
        empty = question if answer and not is_asked else text
        return DataError(f'nothing under "{empty}"', code=EMPTY_CELL, where=place, hint="remove or complete the row")
    expected = "\n".join(f"  {what:<9} {', '.join(names)}" for what, names in columns.items())
    return DataError(
        f"no question with an answer, and no picture with a caption\ncolumns: {', '.join(map(str, row))}",
        where=place,
        hint=f"expected some of:\n{expected}\nname others:  --columns image=PHOTO,question=FRAGE,answer=ANTWORT",
    )


def most_frequent(answers: Sequence[Any]) -> Any:
    """Return the most frequent of several answers, texts or VQAv2's objects; of equal ones the first, None of none.

    >>> most_frequent(["a dog", "dog", {"answer": "dog"}])
    'dog'
    """
    counted = Counter(map(_text_of, answers)).most_common(1)
    return counted[0][0] if counted else None


def _text_of(answer: Any) -> Any:
    answer = answer.get("answer") if isinstance(answer, Mapping) else answer
    return answer if isinstance(answer, str | int | float) else ""
