"""MM-Vet: free-form answers, graded from 0 to 1 by a judge model. Follows yuweihao/MM-Vet mm-vet_evaluator.

A judgement without a number counts as missing, not as 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item, Metric, means, plain_text
from milora_eval.benchmarks.llava_prompts import picture_item
from milora_eval.data_files import find
from milora_vl.common.atomic_write import write_json

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


class MMVet(Benchmark):
    """The mean grade, overall and per capability; a question counts for each capability that it needs."""

    name = "mm-vet"
    max_new_tokens = 1024
    files = ("mm-vet.json", "images")
    folders = ("mmvet",)
    source = "github.com/yuweihao/MM-Vet"
    metric = "grade"
    judge = "gpt-4-0613"

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions; the prompt adds nothing to them."""
        pictures = find(self, data_dir, self.files[1])
        return [
            picture_item(
                name.removeprefix("v1_"),
                entry["question"],
                pictures / entry["imagename"],
                name=name,
                answers=[entry["answer"]],
                meta={"capability": list(entry["capability"])},
            )
            for name, entry in read_json(find(self, data_dir, self.files[0])).items()
        ]

    def score(self, item: Item, text: str) -> None:
        """Return None: only the judge can grade an answer."""

    def grade(self, item: Item, judgement: str) -> float | None:
        """Return the first word of the judgement as a number; None if it is not a number from 0 to 1."""
        try:
            value = float(judgement.split()[0])
        except (ValueError, IndexError):
            return None
        return value if 0 <= value <= 1 else None

    def judge_prompt(self, item: Item, text: str) -> str:
        """Return the evaluator's few-shot prompt; the judge continues it with the grade."""
        truth = item.answers[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        head = Path(__file__).with_name("mm_vet_prompt.txt").read_text(encoding="utf-8")
        return f"{head}\n" + " | ".join([plain_text(item), truth, text, ""])

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the mean grade, overall and per capability."""
        graded = [answer for answer in answers if answer.value is not None]
        metrics = means(graded, self.metric)
        for name in CAPABILITIES:
            part = [answer for answer in graded if name in answer.item.meta["capability"]]
            metrics += [Metric(name, one.value, one.stderr, one.n) for one in means(part, name)[:1]]
        return metrics

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write {"v1_0": answer} for the online evaluator."""
        return [write_json(folder / "mm-vet_results.json", {a.item.id: a.text for a in answers})]
