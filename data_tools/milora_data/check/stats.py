"""`python -m milora_data stats`: count records, pictures, turns and tokens of a data set."""

from __future__ import annotations

import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from milora_data.check.command import image_folder
from milora_data.check.pictures import find_missing
from milora_data.encode.labels import encode
from milora_data.encode.tokens import load_tokenizer
from milora_data.records.compact import CompactRecords
from milora_data.records.record import IMAGE, Record, content_digest
from milora_data.stream.sources import load_records
from milora_vl.common.cli.command_line import next_step
from milora_vl.common.cli.flags import DATA, Command, count, option, shared
from milora_vl.common.errors import DataError, no_records, with_context

SECTIONS = ("tokens", "leakage")
TITLES = {"learnt_per_record": "supervised_per_record"}  # titles that differ from the keys of the JSON output
COMMAND = Command(
    "milora_data stats",
    "Count records, pictures, turns and lengths.",
    """\
examples:
  python -m milora_data stats train.json
  python -m milora_data stats train.json --tokenizer runs/demo --image_tokens 16 --max_length 2048
  python -m milora_data stats train.json --against test.json
""",
    inputs=(
        DATA,
        shared("image_folder", about="folder of the pictures; counts the missing ones"),
        option("--against", type=Path, metavar="TEST", help="count the overlap of this test set with DATA"),
    ),
    settings=(
        option("--tokenizer", help="folder or name of a tokenizer that counts tokens"),
        shared("template", default="vicuna_v1", about="prompt format (default: %(default)s)"),
        shared("image_tokens"),
        option("--max_length", type=count, help="count the records that are longer"),
    ),
    outputs=(
        option("--limit", type=count, default=5, help="lines of each list (default: %(default)s)"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    chosen = COMMAND.parse(argv)
    tokenizer = None if chosen.tokenizer is None else load_tokenizer(chosen.tokenizer)
    folder = None if chosen.image_folder is None else image_folder(chosen.data, chosen.image_folder)
    records = _read(chosen.data)
    if not records:
        raise DataError(problems=[no_records(chosen.data)])
    content = statistics(records, folder)
    if chosen.against is not None:
        content["leakage"] = leakage(records, _read(chosen.against))
    if tokenizer is not None:
        content["tokens"] = token_statistics(
            records,
            tokenizer,
            template=chosen.template,
            image_tokens=chosen.image_tokens,
            max_length=chosen.max_length,
        )
    sys.stdout.write(
        json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        if chosen.format == "json"
        else f"{chosen.data}\n" + as_text(content, chosen.limit)
    )
    pictures = ["--image_folder", folder or image_folder(chosen.data, None)] if content["picture_files"] else []
    next_step("milora_data", "show", chosen.data, *pictures, "--limit", 50, "--html", "OUT.html")
    return 0


def _read(path: Path) -> CompactRecords:
    try:
        return CompactRecords(load_records(path))
    except DataError as error:
        if not path.is_file():  # it has a hint
            raise
        hint = f"see: python -m milora_data check {path}; --fix OUT writes the usable records to a new file"
        raise with_context(error, hint=hint) from None


def statistics(records: Sequence[Record], folder: Path | None = None) -> dict[str, Any]:
    """Return counts and distributions of `records`; lists start with the most frequent item.

    With the folder of the pictures, also the number of those that are missing in it.
    """
    answers, pictures = Counter[str](), Counter[str]()
    with_pictures = with_videos = text_only = 0
    questions, question_words, answer_words = array("q"), array("q"), array("q")
    for record in records:  # once, because each may be unpickled
        with_pictures += bool(record.images)
        with_videos += bool(record.videos)
        text_only += not record.files
        pictures.update(record.images)
        asked = [turn.text for turn in record.turns if turn.role == "user"]
        answered = [turn.text for turn in record.turns if turn.role == "assistant"]
        answers.update(answered)
        questions.append(len(asked))
        question_words.extend(len(text.replace(IMAGE, "").split()) for text in asked)
        answer_words.extend(len(text.split()) for text in answered)
    return {
        "records": len(records),
        "with_pictures": with_pictures,
        "with_videos": with_videos,
        "text_only": text_only,
        "pictures": pictures.total(),
        "picture_files": len(pictures),
        **({} if folder is None else {"missing_picture_files": len(find_missing(pictures, folder))}),
        "questions_per_record": spread(questions),
        "words_per_question": spread(question_words),
        "words_per_answer": spread(answer_words),
        "most_frequent_answers": answers.most_common(),
        "repeated_records": len(records) - len({content_digest(record) for record in records}),
    }


def leakage(train: Sequence[Record], test: Sequence[Record]) -> dict[str, int]:
    """Return how many records of `test` share questions or picture names with `train`."""
    known = {(record.images, turn.text) for record in train for turn in record.turns if turn.role == "user"}
    asked = [
        any((record.images, turn.text) in known for turn in record.turns if turn.role == "user") for record in test
    ]
    names = {name for record in train for name in record.images}
    return {
        "test_records": len(test),
        "with_a_question_of_the_training": sum(asked),
        "with_a_picture_name_of_the_training": sum(any(name in names for name in record.images) for record in test),
    }


def token_statistics(
    records: Iterable[Record], tokenizer: Any, *, template: str, image_tokens: int, max_length: int | None
) -> dict[str, Any]:
    """Return the spread of encoded lengths and of supervised tokens, and the number of records above `max_length`."""
    lengths, supervised, failed = [], [], 0
    for record in records:
        try:
            encoded = encode(record, tokenizer, template=template, image_token_id=-200, image_tokens=image_tokens)
        except DataError:
            failed += 1
            continue
        lengths.append(len(encoded.input_ids))
        supervised.append(sum(label >= 0 for label in encoded.labels))
    return {
        "per_record": spread(lengths),
        "learnt_per_record": spread(supervised),
        "longer_than_max_length": sum(max_length is not None and length > max_length for length in lengths),
        "not_encodable": failed,
    }


def spread(numbers: Sequence[int]) -> dict[str, int]:
    """Return minimum, median, 95th percentile, maximum and sum.

    >>> spread([1, 2, 3, 4, 100])
    {'min': 1, 'median': 3, 'p95': 100, 'max': 100, 'sum': 110}
    """
    ordered = sorted(numbers) or [0]
    return {
        "min": ordered[0],
        "median": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
        "max": ordered[-1],
        "sum": sum(numbers),
    }


def as_text(content: dict[str, Any], limit: int) -> str:
    """Return the statistics as text."""
    lines = []
    for name, value in content.items():
        title = TITLES.get(name, name).replace("_", " ")
        if isinstance(value, int):
            lines.append(f"  {title:<24}{value:>12,}")
        elif name in SECTIONS:
            lines += ["", title, as_text(value, limit).rstrip("\n")]
        elif isinstance(value, dict):
            lines.append(f"  {title:<24}" + "   ".join(f"{key} {number:,}" for key, number in value.items()))
        elif value:
            lines += ["", title, *(f"  {count:>9,}  {_short(text)}" for text, count in value[:limit])]
            lines += [f"             ... and {len(value) - limit:,} more"] * (len(value) > limit)
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 70 else line[:70] + " ..."
