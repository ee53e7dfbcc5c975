"""Convert answers to lines of predictions.jsonl and back. A line holds all that is needed to score it again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import NoneType
from typing import Any

from milora_data.records.record import Turn
from milora_eval.benchmark import Answer, Benchmark, Item
from milora_eval.suites import reference
from milora_vl.base.errors import UserError, expected_format


def to_line(benchmark: Benchmark, item: Item, text: str, key: str, data_dir: Path) -> dict[str, Any]:
    """Return the scored line of one answer; `correct` stays empty (None) if a judge or a server scores it."""
    picture = item.images[0] if item.images else None
    turns = benchmark.prompt(item)
    line: dict[str, Any] = {
        "id": item.id,
        "benchmark": reference(benchmark),
        "type": item.kind,
        "question": turns[-1].text,
        "image": _relative(picture, data_dir),
        "image_file": picture,
        "prediction": text,
        "answers": list(item.answers),
        "correct": benchmark.score(item, text),
        "baseline": item.baseline,
        "group": item.group,
        "key": key,
    }
    if len(turns) > 1:
        line["context"] = [[turn.role, turn.text] for turn in turns[:-1]]
    if len(item.images) > 1:
        line["more_images"] = list(item.images[1:])
    if item.meta:
        line["meta"] = dict(item.meta)
    return line


def to_answer(benchmark: Benchmark, line: Mapping[str, Any], judgement: str | None = None) -> Answer:
    """Return the answer of a line and score it again, from its judgement if there is one."""
    item, text = to_item(line), line["prediction"]
    with expected_of(benchmark, str(line["id"])):
        value = benchmark.score(item, text) if judgement is None else benchmark.grade(item, judgement)
    return Answer(item, text, value, judgement)


def expected_of(benchmark: Benchmark, what: str) -> AbstractContextManager[None]:
    """Return a context that turns errors of a benchmark of ours into a UserError about the stored answer.

    Errors of a user's own class are not caught: the traceback shows their place.
    """
    if not type(benchmark).__module__.startswith("milora_eval."):
        return nullcontext()
    return expected_format(
        f"the stored answer {what!r:.60} does not fit the benchmark {benchmark.name}",
        code="predictions-format",
        where="predictions.jsonl",
        hint="evaluate again, or restore the file",
    )


# Types of the values that scoring reads; None also means a missing key.
_TEXT, _NO_TEXT = (str,), (str, NoneType)
_TYPES: dict[str, tuple[type, ...]] = {
    "id": _TEXT,
    "benchmark": _TEXT,
    "prediction": _TEXT,
    "question": _TEXT,
    "image_file": _NO_TEXT,
    "answers": (list,),
    "type": _TEXT,
    "group": _TEXT,
    "baseline": (int, float, NoneType),
    "meta": (dict, NoneType),
    "context": (list, NoneType),
    "more_images": (list, NoneType),
}


def require_line(line: Mapping[str, Any]) -> None:
    """Raise UserError if `to_line` would not make such a line."""
    wrong = next((key for key, types in _TYPES.items() if not isinstance(line.get(key), types)), None)
    texts = [*(line.get("answers") or ()), *(line.get("more_images") or ())] if wrong is None else []
    if wrong is None and not all(isinstance(text, str) for text in texts):
        wrong = "answers"
    if wrong is None and not all(
        isinstance(turn, list) and len(turn) == 2 and isinstance(turn[1], str) for turn in line.get("context") or ()
    ):
        wrong = "context"
    if wrong is not None:
        raise UserError(
            f"{wrong!r} of the stored answer {line.get('id')!r:.60} is {line.get(wrong)!r:.60}",
            code="predictions-format",
            where="predictions.jsonl",
            hint="evaluate again, or restore the file",
        )


def to_item(line: Mapping[str, Any]) -> Item:
    """Return the item of a line, with the turns that the model saw. Raises UserError for a line of another form."""
    require_line(line)
    turns = [*line.get("context", ()), ["user", line["question"]]]
    first = [line["image_file"]] if line["image_file"] else []
    return Item(
        id=line["id"],
        turns=tuple(Turn(role, text) for role, text in turns),
        images=(*first, *line.get("more_images", ())),
        answers=tuple(line["answers"]),
        kind=line["type"],
        group=line["group"],
        baseline=line["baseline"],
        meta=line.get("meta", {}),
    )


def _relative(picture: str | None, data_dir: Path) -> str | None:
    if picture is None:
        return None
    path, root = Path(picture), data_dir.absolute()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else picture
