"""SEED-Bench, pictures and middle frames of videos: exact match of the letter (LLaVA's convert_seed_for_submission.py).

The official script ranks the likelihoods of the options instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Benchmark, Item, Upload
from milora_eval.benchmarks.llava_prompts import LETTER, lettered, picture_item
from milora_eval.data_files import find_all

CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
VIDEO = "SEED-Bench-video-image"


class SEEDBench(Benchmark):
    """Accuracy over all, pictures and videos; types are in results.json. Without frames, only pictures are asked."""

    name = "seed-bench"
    protocols = ("llava",)
    files = ("SEED-Bench.json", "SEED-Bench-image")
    folders = ("seed_bench",)
    source = "github.com/AILab-CVC/SEED-Bench (frames: LLaVA's extract_video_frames.py, into SEED-Bench-video-image)"

    details = ("type", "type")
    upload = Upload("seed_bench_predictions.jsonl", "question_id", "prediction")

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions; questions about videos only if the frames exist."""
        questions, pictures = find_all(self, data_dir)
        content = read_json(questions)
        types = {number: name for name, number in content["question_type"].items()}
        frames = {path.stem: path for path in (data_dir / VIDEO).glob("*")} if (data_dir / VIDEO).is_dir() else {}
        items = []
        for entry in content["questions"]:
            is_picture = entry["data_type"] == "image"
            if is_picture or frames:
                frame = frames.get(f"{entry['question_type_id']}_{entry['question_id']}") or frames.get(
                    str(entry["question_id"]), data_dir / VIDEO / f"{entry['question_id']}.png"
                )
                items.append(_item(entry, pictures / entry["data_id"] if is_picture else frame, types))
        return items

    def score(self, item: Item, text: str) -> float:
        return float(text == item.answers[0])


def _item(entry: dict[str, Any], picture: Path, types: dict[int, str]) -> Item:
    options = [str(entry[name]) for name in CHOICES if entry.get(name) is not None]
    return picture_item(
        entry["question_id"],
        entry["question"] + lettered(options) + LETTER,
        picture,
        answers=[entry["answer"]],
        kind=entry["data_type"],
        meta={"type": types.get(entry["question_type_id"], "")},
    )
