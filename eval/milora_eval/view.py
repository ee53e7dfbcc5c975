"""One HTML page to browse the answers of an evaluation, or of two: pictures, questions, answers, truths, filters.

The page holds everything itself (thumbnails included) and needs no network.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_eval.lines import to_answer, to_item
from milora_eval.selection import select
from milora_eval.store import Line
from milora_eval.suites import find_benchmark

THUMBNAIL = 320  # pixels a side, shown at half of it on dense screens


def page(runs: Sequence[tuple[str, Sequence[Line]]], limit: int) -> str:
    """Return the page for one run or two, each (name, lines); of many questions, `limit` with their pictures.

    The second run's answers are compared with the first's on the questions of the first.
    """
    from jinja2 import Environment, PackageLoader

    names = [name for name, _ in runs]
    lines = [{(line["benchmark"], line["id"]): line for line in own} for _, own in runs]
    items = [to_item(line) for line in lines[0].values()]
    kept = {id(item) for item in select(items, limit)}
    pictures: dict[str, int] = {}
    rows = [
        _row(key, [own.get(key) for own in lines], pictures)
        for key, item in zip(lines[0], items, strict=True)
        if id(item) in kept
    ]
    content = {
        "runs": names,
        "total": len(items),
        "rows": rows,
        "pictures": [thumbnail(Path(name)) for name in pictures],
    }
    environment = Environment(loader=PackageLoader("milora_eval", "."), autoescape=True)
    template = environment.get_template("view.html.jinja")
    # Plain ASCII and no "<": whatever an answer holds, it cannot end the script it stands in.
    return template.render(title=" and ".join(names), content=json.dumps(content).replace("<", "\\u003c"))


def thumbnail(path: Path) -> str | None:
    """Return a picture as a small data URI, None where it cannot be read any more."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            small = image.convert("RGB")
    except OSError:
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _row(key: tuple[str, str], own: Sequence[Line | None], pictures: dict[str, int]) -> dict[str, Any]:
    first = own[0]
    assert first is not None
    names = [name for name in (first["image_file"], *first.get("more_images", ())) if name]
    return {
        "benchmark": key[0],
        "id": key[1],
        "type": first["type"],
        "context": [f"{role}: {_shown(text)}" for role, text in first.get("context", ())],
        "question": _shown(first["question"]),
        "truths": list(dict.fromkeys(map(str, first["answers"]))),
        "pictures": [pictures.setdefault(name, len(pictures)) for name in names],
        "answers": [None if line is None else _said(line) for line in own],
    }


def _said(line: Mapping[str, Any]) -> dict[str, Any]:
    answer = to_answer(find_benchmark(line["benchmark"]), line, line.get("judgement"))
    return {"text": answer.text, "value": answer.value}


def _shown(text: str) -> str:
    return text.replace("<image>", "").strip()
