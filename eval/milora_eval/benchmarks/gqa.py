"""GQA, testdev-balanced: exact equality. Follows the release's eval.py, and scripts/convert_gqa_for_eval.py of LLaVA.

Open and binary are properties of the question. Consistency and similar metrics need files that testdev does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.data_files import find, write_rows
from milora_eval.rules.short_rules import gqa_correct


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

    def load(self, data_dir: Path) -> list[Item]:
        """Read the balanced questions."""
        questions = read_json(find(self, data_dir, self.files[0]))
        pictures = find(self, data_dir, self.files[1])
        return [
            picture_item(
                name,
                entry["question"] + SHORT,
                pictures / f"{entry['imageId']}.jpg",
                answers=[entry["answer"]] if "answer" in entry else [],
                kind="open" if entry.get("types", {}).get("structural") == "query" else "binary",
                meta=entry.get("types", {}),
            )
            for name, entry in questions.items()
            if entry.get("isBalanced", True)
        ]

    def score(self, item: Item, text: str) -> float | None:
        """Return 1.0 if the answer equals the reference by the protocol's rule."""
        if not item.answers:
            return None
        return float(gqa_correct(text, item.answers[0]) if self.protocol == "llava" else text == item.answers[0])

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write [{questionId, prediction}] for eval.py."""
        predictions = [(a.item.meta["question_id"], a.text) for a in answers]
        if self.protocol == "llava":
            predictions = [(name, text.rstrip(".").lower()) for name, text in predictions]
        rows = [{"questionId": name, "prediction": text} for name, text in predictions]
        path = folder / "testdev_balanced_predictions.json"
        return [write_rows(path, rows)]
