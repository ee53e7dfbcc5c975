"""COCO captions (Karpathy test) and NoCaps (val): CIDEr-D, x 100, with document frequencies from all references.

Captions are tokenized by Penn Treebank rules, without the official Java tokenizer: lower-case, no punctuation, clitics
separate. Ordinary captions give the same words; the official number needs Java.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item, Metric
from milora_eval.benchmarks.llava_prompts import picture_item
from milora_eval.data_files import find, write_rows
from milora_eval.rules.cider import cider_d
from milora_eval.stats import mean, mean_stderr

PROMPT = "Provide a one-sentence caption for the provided image."
NOTE = "points, 100 x CIDEr-D; tokenized without the official Java tokenizer"
_CLITIC = re.compile(r"(n't|'s|'re|'ve|'ll|'d|'m)\b")
_WORD = re.compile(r"n't|'\w+|[\w]+(?:[-.,/:]\w+)*", re.UNICODE)


class COCOCaptions(Benchmark):
    """The Karpathy test split."""

    name = "coco-captions"
    split = "karpathy test"
    files: tuple[str, ...] = ("dataset_coco.json", "val2014|images|.")
    source = "cs.stanford.edu/people/karpathy/deepimagesent (dataset_coco.json) and cocodataset.org (val2014)"
    metric = "CIDEr-D"
    can_resample = False  # pictures drawn twice would change the document frequencies

    def load(self, data_dir: Path) -> list[Item]:
        """Read the pictures and their captions."""
        entries = read_json(find(self, data_dir, self.files[0]))["images"]
        pictures = find(self, data_dir, self.files[1])
        return [
            picture_item(
                entry["cocoid"],
                PROMPT,
                pictures / entry["filename"],
                answers=[sentence["raw"] for sentence in entry["sentences"]],
            )
            for entry in entries
            if entry["split"] == "test"
        ]

    def score(self, item: Item, text: str) -> None:
        """Return None: the score of a caption depends on the captions of the other pictures."""

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return CIDEr-D; the standard error treats the references as fixed."""
        done = [answer for answer in answers if answer.item.answers]
        if not done:
            return []
        references = [[words(text) for text in answer.item.answers] for answer in done]
        scores = [100 * score for score in cider_d([words(answer.text) for answer in done], references)]
        return [Metric(self.metric, mean(scores), mean_stderr(scores), len(done), unit="points", note=NOTE)]

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write [{image_id, caption}]."""
        rows = [{"image_id": a.item.meta["question_id"], "caption": a.text} for a in answers]
        return [write_rows(folder / f"{self.name}_results.json", rows)]


class NoCaps(COCOCaptions):
    """Pictures of objects that COCO does not name."""

    name = "nocaps"
    split = "val"
    files = ("nocaps_val_4500_captions.json", "images|val|.")
    source = "nocaps.org/download"

    def load(self, data_dir: Path) -> list[Item]:
        """Read the pictures and their captions."""
        content = read_json(find(self, data_dir, self.files[0]))
        pictures = find(self, data_dir, self.files[1])
        captions = defaultdict(list)
        for entry in content["annotations"]:
            captions[entry["image_id"]].append(entry["caption"])
        return [
            picture_item(entry["id"], PROMPT, pictures / entry["file_name"], answers=captions[entry["id"]])
            for entry in content["images"]
        ]


def words(caption: str) -> str:
    """Return the words of a caption, separated by spaces.

    >>> words("A dog's ball, isn't it?")
    "a dog 's ball is n't it"
    """
    return " ".join(_WORD.findall(_CLITIC.sub(r" \1", caption.lower())))
