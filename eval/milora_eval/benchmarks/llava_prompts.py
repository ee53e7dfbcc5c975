"""Texts that LLaVA appends to questions, byte for byte as in its question files (docs/Evaluation.md, llava/eval)."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.encode import templates
from milora_data.records.record import Turn
from milora_eval.benchmark import Item

SHORT, LETTER = f"\n{templates.SHORT}", f"\n{templates.LETTER}"
LETTER_CN = "\n请直接回答选项字母。"
LETTERS = string.ascii_uppercase
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def picture_item(
    question_id: object,
    text: str,
    picture: Path,
    *,
    name: str = "",
    answers: Sequence[object] = (),
    kind: str = "",
    group: str = "",
    meta: Mapping[str, Any] | None = None,
) -> Item:
    """Return the item of one question about one picture; `name` is the id if `question_id` alone is not unique."""
    path = str(picture.absolute())
    return Item(
        id=name or str(question_id),
        turns=(Turn("user", f"<image>\n{text}"),),
        images=(path,),
        answers=tuple(map(str, answers)),
        kind=kind,
        group=group or picture.name,
        meta={"question_id": question_id, **(meta or {})},
    )


def lettered(options: Sequence[str]) -> str:
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
