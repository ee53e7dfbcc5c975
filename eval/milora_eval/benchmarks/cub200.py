"""CUB-200-2011, test: which of 26 species is the bird? Follows jessemelpolio/LMM_CL, the code of arXiv:2510.08564.

The files are its data set of the hub, or the original CUB_200_2011, from which utils/cub200_to_llava.py makes the same
kind of question. That script draws without a seed; here the draw depends on the picture's number alone. Its evaluation
also prints its settings into the prompt, by a mistake that is not kept.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from milora_eval.benchmark import Benchmark, Item
from milora_eval.benchmarks.llava_prompts import LETTER, LETTERS, picture_item
from milora_eval.data_files import find, is_table, table_rows
from milora_eval.rules.multiple_choice import cub200_correct

QUESTIONS = (
    "What species is the bird in this photo?",
    "Can you identify the bird species in this image?",
    "Which bird species is shown in this picture?",
    "What type of bird is depicted in this photograph?",
    "Identify the species of the bird in this image.",
    "What is the bird species presented in this photo?",
    "Which of the following species does this bird belong to?",
    "What would you classify this bird as?",
    "From the options below, what species is this bird?",
    "Looking at this bird, what species would you say it is?",
)


class CUB200(Benchmark):
    """The share of right letters."""

    name = "cub200"
    protocols = ("lmm-cl",)
    max_new_tokens = 16
    files = (
        "classes.txt|CUB_200_2011/classes.txt|data/train-*.parquet|train-*.parquet",
        "images|CUB_200_2011/images|data/train-*.parquet|train-*.parquet",
    )
    source = "data.caltech.edu/records/65de6-vp158 (CUB_200_2011), or huggingface.co/datasets/Jessemel/cub200-test"

    def recognises(self, question: Any) -> bool:
        """Return whether a row asks for one of the lettered species."""
        return LETTER.strip() in question.get("question", "")

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions of the hub, or make one for each test picture of CUB_200_2011."""
        path = find(self, data_dir, self.files[0])
        if not is_table(path):
            return _made(path.parent)
        return [
            picture_item(
                number,
                row["question"].replace("\n<image>", "").replace("<image>", ""),
                row["picture"],
                answers=[row["answer"]],
            )
            for number, row in enumerate(table_rows(self, data_dir))
        ]

    def score(self, item: Item, text: str) -> float:
        """Return 1.0 for the right letter."""
        return float(cub200_correct(text, item.answers[0]))


def _made(folder: Path) -> list[Item]:
    """Return a question for each test picture: 26 species in random order, among them the right one."""
    names = {number: name.partition(".")[2].replace("_", " ") for number, name in _pairs(folder, "classes.txt")}
    species, is_train = dict(_pairs(folder, "image_class_labels.txt")), dict(_pairs(folder, "train_test_split.txt"))
    items = []
    for number, path in _pairs(folder, "images.txt"):
        if is_train[number] == "0":
            draw = random.Random(f"cub200 {number}")
            wrong = [name for key, name in names.items() if key != species[number]]
            options = draw.sample(wrong, min(len(wrong), len(LETTERS) - 1))
            place = draw.randint(0, len(options))
            options.insert(place, names[species[number]])
            lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
            text = f"{draw.choice(QUESTIONS)}{LETTER}\n{lines}"
            items.append(picture_item(number, text, folder / "images" / path, answers=[LETTERS[place]]))
    return items


def _pairs(folder: Path, file: str) -> list[tuple[str, Any]]:
    """Return the two columns of a file of CUB_200_2011."""
    lines = (folder / file).read_text(encoding="utf-8").splitlines()
    return [(first, second) for first, _, second in (line.strip().partition(" ") for line in lines) if second]
