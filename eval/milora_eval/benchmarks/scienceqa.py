"""ScienceQA, test: the letter of an answer. Prompts and rule follow LLaVA: convert_sqa_to_llava.py (CQM-A),
model_vqa_science.py (--single-pred-prompt) and eval_science_qa.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_data.records.record import Turn
from milora_eval.benchmark import Answer, Benchmark, Item
from milora_eval.benchmarks.llava_prompts import LETTER, picture_item
from milora_eval.data_files import find
from milora_eval.rules.scienceqa import LETTERS, scienceqa_index
from milora_vl.common.atomic_write import write_json


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
        """Read the problems of the test split."""
        problems = read_json(find(self, data_dir, self.files[0]))
        names = read_json(find(self, data_dir, self.files[1]))[self.split]
        pictures = find(self, data_dir, self.files[2])
        items = [_item(name, problems[name], pictures) for name in names]
        return [item for item in items if item.images or not self.only_pictures]

    def score(self, item: Item, text: str) -> float:
        """Return 1.0 for the letter of the right choice."""
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
