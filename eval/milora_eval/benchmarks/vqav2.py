"""VQAv2: answers of ten annotators, on val2014 (scored locally) and test-dev (scored by the EvalAI server).

Follows GT-Vision-Lab/VQA vqaEval.py; protocol llava first applies the M4C normaliser to the answer, as
scripts/convert_vqav2_for_submission.py does before the upload.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item, Metric, means
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.data_files import find, write_rows
from milora_eval.rules.textvqa import m4c_normalise
from milora_eval.rules.vqa import vqav2_accuracy


class VQAv2(Benchmark):
    """The official accuracy on val2014: overall, by answer type, and (in results.json) by question type."""

    name = "vqav2"
    protocols = ("llava", "official")
    split = "val2014"
    files: tuple[str, ...] = (
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
        "val2014|images|.",
    )
    source = "visualqa.org/download.html and cocodataset.org (COCO_val2014_*.jpg)"

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions, and the annotations if the split has them."""
        questions = read_json(find(self, data_dir, self.files[0]))["questions"]
        known = self._annotations(data_dir)
        pictures = find(self, data_dir, self.files[-1])
        return [self._item(question, known.get(question["question_id"], {}), pictures) for question in questions]

    def score(self, item: Item, text: str) -> float | None:
        """Return the accuracy over the annotators; None without annotations."""
        if not item.answers:
            return None
        return vqav2_accuracy(self.answer(text), item.answers)

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the accuracy: overall, per answer type, and per question type as details."""
        answers = list(answers)
        metrics = means(answers, self.metric)
        details = means(answers, self.metric, kind_of=lambda answer: answer.item.meta["question_type"], detail=True)[1:]
        return [*metrics, *(replace(each, name=f"question type: {each.name}", mean_of=None) for each in details)]

    def answer(self, text: str) -> str:
        """Return the answer in the form that is submitted."""
        return m4c_normalise(text) if self.protocol == "llava" else text

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write [{question_id, answer}]."""
        rows = [{"question_id": a.item.meta["question_id"], "answer": self.answer(a.text)} for a in answers]
        rows += self._unasked({row["question_id"] for row in rows}, data_dir)
        name = f"{self.name.split('-')[0]}_{self.split}_results.json"
        return [write_rows(folder / name, rows)]

    def _annotations(self, data_dir: Path) -> dict[int, dict[str, Any]]:
        known = read_json(find(self, data_dir, self.files[1]))["annotations"]
        return {annotation["question_id"]: annotation for annotation in known}

    def _unasked(self, asked: set[int], data_dir: Path) -> list[dict[str, Any]]:
        return []

    def _item(self, question: dict[str, Any], known: dict[str, Any], pictures: Path) -> Item:
        year = "test2015" if self.split.startswith("test") else self.split
        return picture_item(
            question["question_id"],
            question["question"] + SHORT,
            pictures / f"COCO_{year}_{question['image_id']:012d}.jpg",
            answers=[entry["answer"] for entry in known.get("answers", ())],
            kind=known.get("answer_type", ""),
            meta={"question_type": known.get("question_type", "")},
        )


class VQAv2TestDev(VQAv2):
    """test-dev: writes a file for the server. If the questions of test2015 exist, the others get empty answers."""

    name = "vqav2-testdev"
    split = "test-dev2015"
    files = ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "test2015|images|.")
    folders = ("vqav2",)
    source = "visualqa.org/download.html and cocodataset.org (COCO_test2015_*.jpg)"
    whole = "v2_OpenEnded_mscoco_test2015_questions.json"

    def _annotations(self, data_dir: Path) -> dict[int, dict[str, Any]]:
        return {}

    def _unasked(self, asked: set[int], data_dir: Path) -> list[dict[str, Any]]:
        if not (data_dir / self.whole).is_file():
            return []
        all_ids = (question["question_id"] for question in read_json(data_dir / self.whole)["questions"])
        return [{"question_id": number, "answer": ""} for number in all_ids if number not in asked]
