"""`python -m milora_eval view RUN [OTHER]`: write one HTML page to browse the answers of one or two evaluations.

The page shows pictures, questions, answers and references, with filters. It is self-contained, with small copies of the
pictures, and needs no network.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from milora_data.cards import Card, write_cards
from milora_eval.answers.questions import select
from milora_eval.answers.store import Line, by_question, to_answer
from milora_eval.commands.flags import names_of
from milora_eval.scores.results import require_lines
from milora_vl.common.cli.console import next_step
from milora_vl.common.cli.parser import Command, option, shared
from milora_vl.common.errors import UserError, require_folder
from milora_vl.report.page import answer_card

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
        shared("limit", default=300, about="largest number of questions on the page (default: %(default)s)"),
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
    cards, total = cards_of(runs, options.limit)
    files = {line["image_file"] for _, lines in runs for line in lines if line["image_file"]}
    names = [name for name, _ in runs]
    count = f"{len(cards):,} of {total:,}" if len(cards) < total else f"{total:,}"
    write_cards(
        target,
        cards,
        kind="answers",
        title=" and ".join(names),
        lede=_lede(names, cards),
        note=f"{count} questions. An answer counts as right if its score is at least 0.5.",
        credited=[folder for file in sorted(files) for folder in list(Path(file).parents)[:2]],
    )
    summary = {"page": str(target), "questions": len(cards), "of": total}
    sys.stdout.write(json.dumps(summary) + "\n" if options.format == "json" else f"{target}\n")
    next_step("milora_eval", "compare", options.folder, options.other or "OTHER")
    return 0


def cards_of(runs: Runs, limit: int) -> tuple[list[Card], int]:
    """Return the cards of at most `limit` questions of the first run, and the number of its questions."""
    names, lines = [name for name, _ in runs], [by_question(run_lines) for _, run_lines in runs]
    items = [to_answer(line).item for line in lines[0].values()]
    chosen = {id(item) for item in select(items, limit)}
    cards = []
    for key, item in zip(lines[0], items, strict=True):
        if id(item) in chosen:
            answers = [by_key.get(key) for by_key in lines]
            cards.append(answer_card(dict(zip(names, answers, strict=True)), _kinds(answers)))
    return cards, len(items)


def _kinds(answers: Sequence[Line | None]) -> list[str]:
    values = [None if answer is None else answer["correct"] for answer in answers]
    marks = ["not scored" if value is None else "right" if value >= 0.5 else "wrong" for value in values]
    kinds = marks[-1:]
    if len(answers) > 1:
        texts = [answer and answer["prediction"] for answer in answers]
        kinds += ["changed"] if texts[0] != texts[1] else []
        kinds += [f"now {marks[1]}"] if marks in (["wrong", "right"], ["right", "wrong"]) else []
    return kinds


def _lede(names: Sequence[str], cards: Sequence[Card]) -> str:
    num = Counter(kind for card in cards for kind in card.kinds)
    if len(names) == 1:
        scored = num["right"] + num["wrong"]
        return f"{num['right']:,} of {scored:,} answers are right" if scored else "The answers are not scored yet"
    first, second = names
    gained, lost = num["now right"], num["now wrong"]
    return f"{second} corrects {gained:,} wrong answers of {first}, and gets {lost:,} of its right ones wrong"
