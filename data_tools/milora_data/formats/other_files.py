"""Convert RefCOCO, COCO captions, tables and instructions of text alone to LLaVA records.

Instructions have the fields of Stanford Alpaca and AGI-Edgerunners/LLM-Adapters (commonsense_170k.json), or of
MetaMathQA; `system` and `history` are as in LLaMA-Factory's form of Alpaca.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import missing_file, read_json, read_rows
from milora_data.formats.vqa_files import Options, Records, record
from milora_data.pictures.embedded import stored_pictures
from milora_data.pictures.files import on_padded_square
from milora_data.records.record import IMAGE, earlier, identifier_of
from milora_vl.common.errors import MALFORMED, DataError, first_line

DEFAULT_PROMPT = "Describe this picture."
WHERE_IS = "Please provide the bounding box coordinate of the region this sentence describes: {}"
COLUMNS = {
    "image": ("image", "image_path", "file_name", "filename", "file", "path", "images"),
    "question": ("question", "query", "instruction", "prompt", "problem"),
    "answer": ("answer", "answers", "response", "output", "label", "multiple_choice_answer", "solution"),
    "caption": ("caption", "text", "description", "captions"),
    "input": ("input",),
    "system": ("system", "system_prompt"),
}
EMPTY_CELL = "table-empty-cell"
FIELDS = (("instruction", "output"), ("query", "response"))


def coco_captions(sources: Sequence[Path], options: Options) -> Records:
    """COCO captions: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    for path in sources:
        content = read_json(path)
        names = {row["id"]: row["file_name"] for row in content["images"]}
        for row in content["annotations"]:
            name = names.get(row["image_id"])
            if name is None:
                raise DataError(
                    f"a caption for picture {row['image_id']}, which the file does not list",
                    code="captions-without-picture",
                    where=str(path),
                    hint='use the published annotation file, unchanged: its "images" list every picture',
                )
            image = options.image(row["image_id"], name.replace("{", "{{").replace("}", "}}"))
            yield record(
                row.get("id", row["image_id"]), image, [(options.prompt or DEFAULT_PROMPT, row["caption"].strip())]
            )


class _PlainUnpickler(pickle.Unpickler):
    """Loading a pickle can run any code; this unpickler accepts only lists, dicts, texts and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it contains {module}.{name}, not data alone")


def read_plain_pickle(path: Path) -> Any:
    """Return the lists, dicts, texts and numbers of a pickle (also Python 2). Raises `DataError` for other content."""
    if not path.is_file():
        raise missing_file(path)
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, *MALFORMED) as error:
        raise DataError(
            f"cannot be read as a pickle of plain data: {first_line(error)}",
            code="data-unsafe-pickle",
            where=str(path),
            hint="use the published file, or store its content as JSON",
        ) from None


def refcoco(sources: Sequence[Path], options: Options) -> Records:
    """RefCOCO, RefCOCO+, RefCOCOg: refs(...).p or .json, and instances.json; boxes relative to the padded square."""
    contents = [read_plain_pickle(path) if path.suffix == ".p" else read_json(path) for path in sources]
    refs = next((content for content in contents if isinstance(content, list)), None)
    instances = next((content for content in contents if isinstance(content, dict)), None)
    if refs is None or instances is None:
        raise DataError(
            "expected two files: refs(...).p (or the same as JSON) and instances.json", code="convert-missing-input"
        )
    images = {row["id"]: row for row in instances["images"]}
    boxes = {row["id"]: row["bbox"] for row in instances["annotations"]}
    for ref in refs:
        if ref.get("split", options.split) != options.split:
            continue
        image, (left, top, width, height) = images[ref["image_id"]], boxes[ref["ann_id"]]
        shares = on_padded_square((left, top, left + width, top + height), image["width"], image["height"])
        box = "[" + ", ".join(f"{share:.2f}" for share in shares) + "]"
        name = options.image(ref["image_id"], image["file_name"].replace("{", "{{").replace("}", "}}"))
        questions = dict.fromkeys(WHERE_IS.format(sentence["sent"]) for sentence in ref["sentences"])
        yield record(ref["ref_id"], name, [(question, box) for question in questions])


def table(sources: Sequence[Path], options: Options) -> Records:
    """Rows with picture, question and answer, or picture and caption. Rows with an empty cell are left out."""
    for path in sources:
        for number, (place, row) in enumerate(read_rows(path)):
            if not isinstance(row, dict):
                raise DataError(
                    f"expected a row (an object), got {type(row).__name__}",
                    code="record-not-an-object",
                    where=f"{path}:{place}",
                )
            identifier = place if place.isdecimal() else str(number)  # the line of a row without an id
            try:
                converted = row_record(row, options, place=f"{path}:{place}", identifier=identifier)
            except DataError as error:
                if error.first.code != EMPTY_CELL:
                    raise
                options.leave_out(error)
                continue
            yield from stored_pictures(converted, f"{path}:{place}", options.left_out)


def row_record(row: Mapping[str, Any], options: Options, *, place: str, identifier: str) -> dict[str, Any]:
    """Return the record of one row, whose columns are recognized by name.

    Raises `DataError` with the code EMPTY_CELL if the row has the columns, but no text in one; else if it lacks them.
    `input`, `system` and `history` have the same meaning as in Alpaca (see `instructions`); an input without a question
    is used as the question.
    """
    cells = {
        what: next((row[name] for name in names if row.get(name) not in (None, "", [])), None)
        for what, names in COLUMNS.items()
    }
    answer = cells["answer"] if cells["question"] else cells["caption"] or cells["answer"]
    if isinstance(answer, list | tuple):
        answer = answer[0] if answer else None
    if isinstance(answer, int | float):
        answer = str(answer)
    asks_nothing = cells["caption"] or not any(name in row for name in COLUMNS["question"])  # a picture to describe
    asked = cells["question"] or cells["input"] or (cells["image"] if asks_nothing else None)
    if not isinstance(answer, str) or not answer.strip() or not asked:
        columns = {what: next((name for name in names if name in row), "") for what, names in COLUMNS.items()}
        question = columns["question"] or columns["input"] or columns["image"]
        text = columns["answer"] if columns["question"] else columns["caption"] or columns["answer"]
        if question and text and (not answer or isinstance(answer, str)):
            empty = question if answer and not asked else text
            raise _empty_cell(empty, place)
        expected = "\n".join(f"  {what:<9} {', '.join(names)}" for what, names in COLUMNS.items())
        raise DataError(
            f"no question with an answer, and no picture with a caption\ncolumns: {', '.join(map(str, row))}",
            code="table-missing-columns",
            where=place,
            hint=f"expected some of:\n{expected}",
        )
    question = with_input(str(cells["question"] or ""), str(cells["input"] or ""))
    question = (question or options.prompt or DEFAULT_PROMPT).replace(IMAGE, "").strip()
    images = cells["image"] if isinstance(cells["image"], list) else [cells["image"]] if cells["image"] else []
    exchanges = [*earlier(row, place), (question, answer.strip())]
    converted = record(identifier_of(row, ("id", "question_id"), identifier), None, exchanges)
    if images:
        converted["conversations"][0]["value"] = f"{IMAGE}\n" * len(images) + converted["conversations"][0]["value"]
        converted = {"id": converted["id"], "image": images[0] if len(images) == 1 else images, **converted}
    return with_system(options.with_kept(converted, row), cells["system"])


def _empty_cell(name: str, place: str) -> DataError:
    return DataError(f'nothing under "{name}"', code=EMPTY_CELL, where=place, hint="remove or complete the row")


def instructions(sources: Sequence[Path], options: Options) -> Records:
    """{"instruction", "input"?, "output"} or {"query", "response"}, as a list or one per line; texts are not changed.

    Records without a question or an answer are left out, as in a table. A `system` text and the exchanges of `history`
    come first. Raises `DataError` if the fields are missing.
    """
    for path in sources:
        for number, (place, value) in enumerate(read_rows(path), start=1):
            fields, where = value if isinstance(value, Mapping) else {}, f"{path}:{place}"
            try:
                exchanges = [*earlier(fields, where), _exchange(fields, where)]
            except DataError as error:
                if error.first.code != EMPTY_CELL:
                    raise
                options.leave_out(error)
                continue
            converted = options.with_kept(record(fields.get("id", number), None, exchanges), fields)
            yield with_system(converted, fields.get("system"))


def with_input(instruction: str, text: str) -> str:
    """Return the instruction, followed by the input `text` on a new line; either may be empty."""
    return "\n".join(filter(None, (instruction, text)))


def with_system(converted: dict[str, Any], text: object) -> dict[str, Any]:
    """Insert a system turn at the start of a record if `text` is not empty."""
    if text:
        converted["conversations"].insert(0, {"from": "system", "value": str(text)})
    return converted


def _exchange(fields: Mapping[str, Any], place: str) -> tuple[str, str]:
    text = fields.get("input") or ""
    for names in FIELDS:
        question, answer = ("" if fields.get(name, 0) is None else fields.get(name) for name in names)
        if isinstance(question, str) and isinstance(answer, str) and isinstance(text, str):
            exchange = with_input(question, text), answer
            for name, part in zip(names, exchange, strict=True):
                if not part.strip():
                    raise _empty_cell(name, place)
            return exchange
    expected = " or ".join(f"{first} and {second}" for first, second in FIELDS)
    raise DataError(
        f"expected an object with the texts {expected}; it has {', '.join(fields) or 'none'}",
        code="table-missing-columns",
        where=place,
    )
