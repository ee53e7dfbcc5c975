"""GQA, testdev-balanced: exact equality. Follows the release's eval.py, and scripts/convert_gqa_for_eval.py of LLaVA.

Open and binary are properties of the question. Consistency and similar metrics need files that testdev does not have.
"""

from __future__ import annotations

from pathlib import Path

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Benchmark, Item, Upload
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.data_files import find_all


class GQA(Benchmark):
    """Accuracy over all, open and binary questions. Protocol llava ignores trailing periods and case; official not."""

    name = "gqa"
    protocols = ("llava", "official")
    split = "testdev_balanced"
    files = (
        "testdev_balanced_questions.json|questions1.2/testdev_balanced_questions.json|data/testdev_balanced_questions.json",
        "images|data/images",
    )
    source = "cs.stanford.edu/people/dorarad/gqa/download.html"
    upload = Upload("testdev_balanced_predictions.json", "questionId", "prediction")  # for eval.py

    def load(self, data_dir: Path) -> list[Item]:
        questions, pictures = find_all(self, data_dir)
        return [
            picture_item(
                name,
                entry["question"] + SHORT,
                pictures / f"{entry['imageId']}.jpg",
                answers=[entry["answer"]] if "answer" in entry else [],
                kind="open" if entry.get("types", {}).get("structural") == "query" else "binary",
                meta=entry.get("types", {}),
            )
            for name, entry in read_json(questions).items()
            if entry.get("isBalanced", True)
        ]

    def score(self, item: Item, text: str) -> float | None:
        return float(self.uploaded(text) == item.answers[0]) if item.answers else None

    def uploaded(self, text: str) -> str:
        return text.rstrip(".").lower() if self.protocol == "llava" else text
