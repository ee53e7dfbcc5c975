"""MM-Vet and LLaVA-Bench (in the wild): free-form answers, which a judge model grades with the official scripts.

Only their answer files are written here: MM-Vet's for its online evaluator, and for LLaVA-Bench the answers.jsonl that
llava/eval/eval_gpt_review_bench.py reads. lmms-eval grades both with `--model milora`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item
from milora_eval.benchmarks.llava_prompts import picture_item
from milora_eval.data_files import find_all, json_values
from milora_vl.common.atomic_write import write_json


class FreeForm(Benchmark):
    max_new_tokens = 1024

    def score(self, item: Item, text: str) -> None:
        """Return None: only a judge can grade an answer."""


class MMVet(FreeForm):
    name = "mm-vet"
    files = ("mm-vet.json", "images")
    folders = ("mmvet",)
    source = "github.com/yuweihao/MM-Vet"

    def load(self, data_dir: Path) -> list[Item]:
        questions, pictures = find_all(self, data_dir)
        return [
            picture_item(
                name.removeprefix("v1_"),
                entry["question"],
                pictures / entry["imagename"],
                name=name,
                answers=[entry["answer"]],
                meta={"capability": list(entry["capability"])},
            )
            for name, entry in read_json(questions).items()
        ]

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        return [write_json(folder / "mm-vet_results.json", {a.item.id: a.text for a in answers})]


class LLaVABench(FreeForm):
    name = "llava-bench"
    protocols = ("llava",)
    files = ("questions.jsonl", "images")
    folders = ("llava-bench-in-the-wild",)
    source = "huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"

    def load(self, data_dir: Path) -> list[Item]:
        questions, pictures = find_all(self, data_dir)
        return [
            picture_item(
                line["question_id"],
                line["text"],
                pictures / line["image"],
                kind=line["category"],
                meta={"image": line["image"]},
            )
            for line in json_values(questions)
        ]
