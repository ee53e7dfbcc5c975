"""`python -m milora_eval view RUN [OTHER]`: write one HTML page to browse the answers of one or two evaluations.

The page shows pictures, questions, answers and references, with filters. It is self-contained, with small copies of the
pictures, and needs no network.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.keys import file_key
from milora_data.pictures.load import credit_lines, fitting, thumbnail
from milora_eval.answers.questions import select
from milora_eval.answers.store import Line, by_question, to_answer
from milora_eval.commands.flags import names_of
from milora_eval.scores.results import require_lines
from milora_vl.common.cli.console import next_step, require_folder
from milora_vl.common.cli.page import MAX_BYTES, render, write
from milora_vl.common.cli.parser import Command, option, shared
from milora_vl.common.errors import UserError

Runs = Sequence[tuple[str, Sequence[Line]]]

COMMAND = Command(
    "milora_eval view",
    "Write one HTML page to browse the answers of one or two runs.",
    """\
examples:
  python -m milora_eval view runs/one/eval/emoji/final
  python -m milora_eval view runs/one/eval/emoji/base runs/one/eval/emoji/final --output answers.html
""",
    inputs=(
        option("folder", type=Path, metavar="RUN", help="results folder, for example runs/one/eval/emoji/base"),
        option("other", type=Path, nargs="?", metavar="OTHER", help="second results folder to compare with"),
    ),
    outputs=(
        shared("limit", default=1000, about="largest number of questions on the page (default: %(default)s)"),
        option("--output", type=Path, help="HTML file to write (default: view.html in the last folder)"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    options = COMMAND.parse(argv)
    folders = [folder for folder in (options.folder, options.other) if folder is not None]
    if options.output is not None:
        require_folder(options.output.parent, "--output")
    runs = [(name, require_lines(folder)) for name, folder in zip(names_of(folders), folders, strict=True)]
    if options.output is not None and options.output.exists():
        hint = "nothing was written; choose another file with --output"
        raise UserError(f"{options.output} exists already", code="output-exists", hint=hint)
    target = options.output or folders[-1] / "view.html"
    html, shown, total = page(runs, options.limit)
    write(target, html)
    summary = {"page": str(target), "questions": shown, "of": total}
    sys.stdout.write(json.dumps(summary) + "\n" if options.format == "json" else f"{target}\n")
    next_step("milora_eval", "compare", options.folder, options.other or "OTHER")
    return 0


def page(runs: Runs, limit: int) -> tuple[str, int, int]:
    """Return the page, the number of questions on it (at most `limit`), and the number of all questions.

    The page shows the questions of the first run, one or two answers to each, and small copies of the pictures.
    """
    names = [name for name, _ in runs]
    lines = [by_question(run_lines) for _, run_lines in runs]
    items = [to_answer(line).item for line in lines[0].values()]
    kept = {id(item) for item in select(items, limit)}
    pictures: dict[tuple[str, str], int] = {}  # file and key -> number; a file with another content is not shown
    rows = [
        _row([by_key.get(key) for by_key in lines], pictures)
        for key, item in zip(lines[0], items, strict=True)
        if id(item) in kept
    ]
    budget = max(MAX_BYTES * 9 // 10 - len(json.dumps(rows)), MAX_BYTES // 3)
    small = fitting([thumbnail(Path(name)) if file_key(name) == key else None for name, key in pictures], budget)
    content = json.dumps({"runs": names, "rows": rows, "pictures": small})
    count = f"{len(rows):,} of {len(items):,}" if len(rows) < len(items) else f"{len(rows):,}"
    html = render(
        Path(__file__).with_name("view.html.j2"),
        {
            "title": " and ".join(names),
            "lede": _lede(names, rows),
            "about": f"{count} questions",
            "credits": credit_lines(folder for name, _ in pictures for folder in list(Path(name).parents)[:2]),
            # Plain ASCII without "<", so no answer can end the script element that contains it.
            "content": content.replace("<", "\\u003c"),
        },
    )
    return html, len(rows), len(items)


def _lede(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    marks = [[None if a is None or a["value"] is None else a["value"] >= 0.5 for a in row["answers"]] for row in rows]
    if len(names) == 1:
        scored = [mark for (mark,) in marks if mark is not None]
        return f"{sum(scored):,} of {len(scored):,} answers are right" if scored else "The answers are not scored yet"
    gained, lost = marks.count([False, True]), marks.count([True, False])
    first, second = names
    return f"{second} corrects {gained:,} wrong answers of {first}, and gets {lost:,} of its right ones wrong"


def _row(lines: Sequence[Line | None], pictures: dict[tuple[str, str], int]) -> dict[str, Any]:
    first = lines[0]
    assert first is not None
    names = [name for name in (first["image_file"], *first.get("more_images", ())) if name]
    keyed = zip(names, first.get("content", ()), strict=False)
    return {
        "benchmark": first["benchmark"],
        "id": first["id"],
        "type": first["type"],
        "context": [f"{role}: {_shown(text)}" for role, text in first.get("context", ())],
        "question": _shown(first["question"]),
        "truths": list(dict.fromkeys(map(str, first["answers"]))),
        "pictures": [pictures.setdefault(shown, len(pictures)) for shown in keyed],
        "answers": [line and {"text": line["prediction"], "value": line["correct"]} for line in lines],
    }


def _shown(text: str) -> str:
    return text.replace("<image>", "").strip()
