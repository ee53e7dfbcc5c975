"""One answer as a line of predictions.jsonl, and back: the line alone is enough to score the answer again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milora_data.records import Turn
from milora_eval.benchmark import Answer, Benchmark, Item
from milora_eval.suites import reference


def to_line(benchmark: Benchmark, item: Item, text: str, key: str, data_dir: Path) -> dict[str, Any]:
    """Return the line of one answer, scored; `correct` is None where a judge or a server scores."""
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
    """Return the answer of a line, scored anew; with a judgement, graded by it."""
    item, text = to_item(line), line["prediction"]
    value = benchmark.score(item, text) if judgement is None else benchmark.grade(item, judgement)
    return Answer(item, text, value, judgement)


def to_item(line: Mapping[str, Any]) -> Item:
    """Return the item of a line; its turns are those that were shown."""
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
