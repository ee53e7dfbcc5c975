"""ScienceQA, test: the letter of an answer. Prompts and rule follow LLaVA: convert_sqa_to_llava.py (CQM-A),
model_vqa_science.py (--single-pred-prompt) and eval_science_qa.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_data.records.record import Turn
from milora_eval.benchmark import Answer, Benchmark, Item
from milora_eval.benchmarks.llava_prompts import LETTER, picture_item
from milora_eval.data_files import find_all
from milora_vl.common.atomic_write import write_json

FAILED = "FAILED"
LETTERS = "ABCDE"


class ScienceQA(Benchmark):
    """All questions: accuracy overall, with a picture and without. A picture comes before the context."""

    name = "scienceqa-all"
    protocols = ("llava",)
    max_new_tokens = 1024
    files = ("problems.json", "pid_splits.json", "images/test|test|images")
    folders: tuple[str, ...] = ("scienceqa",)
    source = "github.com/lupantech/ScienceQA"
    only_pictures = False

    def load(self, data_dir: Path) -> list[Item]:
        problems, splits, pictures = find_all(self, data_dir)
        known = read_json(problems)
        items = [_item(name, known[name], pictures) for name in read_json(splits)[self.split]]
        return [item for item in items if item.images or not self.only_pictures]

    def score(self, item: Item, text: str) -> float:
        return float(scienceqa_index(text, item.meta["num_choices"]) == item.meta["answer"])

    def llava_question(self, item: Item) -> dict[str, Any]:
        """Return the prompt with its `<image>`, from which eval_science_qa.py detects questions with a picture."""
        return super().llava_question(item) | {"text": item.question}

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write the output file of eval_science_qa.py: the scores, and the index and text of every answer."""
        right = sum(self.score(a.item, a.text) for a in answers)
        chosen = {a.item.id: scienceqa_index(a.text, a.item.meta["num_choices"]) for a in answers}
        result = {
            "acc": right / len(answers) * 100,
            "correct": int(right),
            "count": len(answers),
            "results": chosen,
            "outputs": {a.item.id: a.text for a in answers},
        }
        return [write_json(folder / "scienceqa_result.json", result)]


class ScienceQAImages(ScienceQA):
    """The questions with a picture, as in the paper's table."""

    name = "scienceqa"
    only_pictures = True


def _item(name: str, problem: dict[str, Any], pictures: Path) -> Item:
    meta = {"num_choices": len(problem["choices"]), "answer": problem["answer"], "subject": problem.get("subject", "")}
    answers = [LETTERS[problem["answer"]]]
    if problem["image"]:
        return picture_item(
            name,
            _prompt(problem),
            pictures / name / problem["image"],
            answers=answers,
            kind="with picture",
            group=name,  # every picture has the file name image.png
            meta=meta | {"image": f"{name}/{problem['image']}"},
        )
    turns = (Turn("user", _prompt(problem)),)
    return Item(name, turns, (), tuple(answers), "without picture", name, meta=meta | {"question_id": name})


def _prompt(problem: dict[str, Any]) -> str:
    context = problem["hint"].strip() or "N/A"
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
    block = f"Context: {context}\nQuestion: {problem['question']}\nOptions: {choices}\n"
    return block.replace("  ", " ").strip().replace("<image>", "").strip() + LETTER


def scienceqa_letter(text: str) -> str:
    """Return the letter of an answer (a bare letter, "B. ...", or one "The answer is B" and a character), or FAILED.

    >>> scienceqa_letter("B"), scienceqa_letter("B. red"), scienceqa_letter("(B)")
    ('B', 'B', 'FAILED')
    """
    if len(text) == 1 and text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return str(found[0]) if len(found) == 1 else FAILED


def scienceqa_index(text: str, num_choices: int) -> int:
    letter = scienceqa_letter(text)
    return LETTERS.index(letter) if letter in list(LETTERS[:num_choices]) else -1
