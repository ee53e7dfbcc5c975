"""VizWiz-VQA: val is scored locally, test by the EvalAI server.

The official script normalises the answer but never the references. Protocol llava first applies the M4C normaliser, as
scripts/convert_vizwiz_for_submission.py does. As in LLaVA's question file, only the first letter of a question is a
capital, and the id is the line number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item
from milora_eval.benchmarks.llava_prompts import SHORT, UNANSWERABLE, picture_item
from milora_eval.data_files import find, write_rows
from milora_eval.rules.textvqa import m4c_normalise
from milora_eval.rules.vqa import vizwiz_accuracy


class VizWiz(Benchmark):
    """val: the accuracy, overall and per answer type."""

    name = "vizwiz"
    protocols = ("llava", "official")
    split = "val"
    files: tuple[str, ...] = ("val.json|Annotations/val.json", "val|images|.")
    source = "vizwiz.org/tasks-and-datasets/vqa"

    def recognises(self, question: Any) -> bool:
        """Return whether a question is about a picture of VizWiz."""
        return isinstance(question, dict) and str(question.get("image")).startswith("VizWiz_")

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions; the file name of the picture is the id."""
        entries = read_json(find(self, data_dir, self.files[0]))
        pictures = find(self, data_dir, self.files[1])
        return [
            picture_item(
                number,
                entry["question"].capitalize() + UNANSWERABLE + SHORT,  # "What is this? and can i eat it?"
                pictures / entry["image"],
                name=entry["image"],
                answers=[answer["answer"] for answer in entry.get("answers", ())],
                kind=entry.get("answer_type", ""),
                meta={"image": entry["image"]},
            )
            for number, entry in enumerate(entries)
        ]

    def score(self, item: Item, text: str) -> float | None:
        """Return the accuracy over the annotators; None without annotations."""
        return vizwiz_accuracy(self.answer(text), item.answers) if item.answers else None

    def answer(self, text: str) -> str:
        """Return the answer in the form that is submitted."""
        return m4c_normalise(text) if self.protocol == "llava" else text

    def llava_keys(self, item: Item) -> tuple[str, ...]:
        """Return the number of the question and the name of the picture."""
        return str(item.meta["question_id"]), item.id

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write [{image, answer}]."""
        rows = [{"image": a.item.meta["image"], "answer": self.answer(a.text)} for a in answers]
        return [write_rows(folder / f"vizwiz_{self.split}.json", rows)]


class VizWizTest(VizWiz):
    """test: writes a file for the server."""

    name = "vizwiz-test"
    split = "test"
    files = ("test.json|Annotations/test.json", "test|images|.")
    folders = ("vizwiz",)
