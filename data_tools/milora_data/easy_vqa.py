"""`python -m milora_data easy-vqa`: write easy-VQA, questions about simple shapes, as LLaVA JSON plus pictures.

easy-VQA (Victor Zhou, MIT licence) has 5,000 pictures with one coloured shape each, 48,248 questions and 13 answers.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.assets import create, fetch
from milora_data.encode.templates import SHORT
from milora_data.formats.tables import record
from milora_vl.common.atomic_write import complete_folder
from milora_vl.common.cli.parser import Command, shared

VAL_PICTURES = 200
TURNS = 4  # questions per training record; one picture has about ten
CALL = "python -m milora_data easy-vqa"
SHAPES = ("circle", "rectangle", "triangle")
README = """\
# easy-VQA

Pictures and questions: easy-VQA by Victor Zhou, MIT licence (https://github.com/vzhou842/easy-VQA), version 1.0.
Made by `{call}`.

- `test.json`: the official test part, one question per record.
- `val.json`: the questions about {val_pictures} pictures of the official training part, one per record.
- `train.json`: the questions about its other pictures, in random order, up to {turns} per record.
"""
COMMAND = Command(
    "milora_data easy-vqa",
    "Create the data set easy-VQA: pictures of shapes with questions and answers in LLaVA's format.",
    "examples:\n  python -m milora_data easy-vqa --output_dir data/easy-vqa\n",
    outputs=(
        shared("output_dir", default=Path("data/easy-vqa"), about="folder to write (default: %(default)s)"),
        shared("format"),
    ),
)
Questions = Mapping[int, Sequence[tuple[str, str]]]


def main(argv: Sequence[str] | None = None) -> int:
    chosen = COMMAND.parse(argv)
    return create(chosen.output_dir, chosen.format, CALL, write)


def write(folder: Path) -> dict[str, int]:
    """Write the data set; return the number of records per file. The folder gets its name only when it is complete."""
    source = fetch("easy_vqa")
    training, test = _questions(source / "train"), _questions(source / "test")
    rng = random.Random(0)
    held_out = set(rng.sample(sorted(training), VAL_PICTURES))
    files = {
        "train.json": _conversations({i: training[i] for i in training if i not in held_out}, rng),
        "val.json": _single({i: training[i] for i in training if i in held_out}, "train"),
        "test.json": _single(test, "test"),
    }
    with complete_folder(folder.absolute()) as scratch:  # "." has no name
        for part in ("train", "test"):
            shutil.copytree(source / part / "images", scratch / "images" / part)
        for name, records in files.items():
            (scratch / name).write_text(json.dumps(records, indent=1), encoding="utf-8")
        (scratch / "README.md").write_text(
            README.format(val_pictures=VAL_PICTURES, turns=TURNS, call=CALL), encoding="utf-8"
        )
    return {name: len(records) for name, records in files.items()}


def _questions(folder: Path) -> Questions:
    by_picture: dict[int, list[tuple[str, str]]] = {}
    for question, answer, picture in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        by_picture.setdefault(picture, []).append((question, answer))
    return by_picture


def _conversations(questions: Questions, rng: random.Random) -> list[dict[str, Any]]:
    """Return shuffled records of up to TURNS questions; the official order starts with what answers all others."""
    records = []
    for picture, pairs in questions.items():
        pairs = rng.sample(pairs, len(pairs))
        for start in range(0, len(pairs), TURNS):
            records.append(_record(f"train-{picture}-{start}", picture, "train", pairs[start : start + TURNS]))
    rng.shuffle(records)
    return records


def _single(questions: Questions, part: str) -> list[dict[str, Any]]:
    """Return one record per question with its type, for a mean per type."""
    return [
        {**_record(f"{part}-{picture}-{n}", picture, part, [pair]), "type": _type(pair[1])}
        for picture, pairs in questions.items()
        for n, pair in enumerate(pairs)
    ]


def _record(identifier: str, picture: int, part: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return a record; as in LLaVA-1.5's mixture, its first question says that the answer is short."""
    (question, answer), *others = pairs
    return record(identifier, f"{part}/{picture}.png", [(f"{question}\n{SHORT}", answer), *others])


def _type(answer: str) -> str:
    return "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"
