"""RefCOCO, RefCOCO+ and RefCOCOg: the box of a sentence, right if the overlap (IoU) is at least 0.5.

Reads the files of lichengunc/refer. The reference box is converted to the square that LLaVA pads a picture to (its
issues 606, 822); lmms-eval uses fractions of the unpadded picture, which is wrong for LLaVA-1.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json, read_plain_pickle
from milora_data.pictures.files import on_padded_square
from milora_eval.benchmark import Benchmark, Item
from milora_eval.benchmarks.llava_prompts import picture_item
from milora_eval.data_files import find
from milora_eval.rules.refcoco import box_of, iou

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: "


class RefCOCO(Benchmark):
    """Accuracy over val, testA and testB together, and over each."""

    name = "refcoco"
    version = "unc"
    split = "val, testA, testB"
    protocols = ("llava",)
    files: tuple[str, ...] = ("refs(unc).p", "instances.json", "train2014|images|.")
    source = "github.com/lichengunc/refer and cocodataset.org (train2014)"
    metric = "accuracy at IoU 0.5"

    def load(self, data_dir: Path) -> list[Item]:
        """Read the sentences of all splits except train."""
        path = find(self, data_dir, self.files[0])
        instances = read_json(find(self, data_dir, self.files[1]))
        pictures = find(self, data_dir, self.files[2])
        boxes = {entry["id"]: entry["bbox"] for entry in instances["annotations"]}
        sizes = {entry["id"]: entry for entry in instances["images"]}
        return [
            _item(ref, sentence, boxes[ref["ann_id"]], sizes[ref["image_id"]], pictures)
            for ref in read_plain_pickle(path)
            if ref["split"] != "train"
            for sentence in ref["sentences"]
        ]

    def score(self, item: Item, text: str) -> float:
        """Return 1.0 for a box with an IoU of at least 0.5."""
        return float(iou(box_of(text), item.meta["box"]) >= 0.5)


class RefCOCOPlus(RefCOCO):
    """Sentences without location words."""

    name = "refcoco+"


class RefCOCOg(RefCOCO):
    """Longer sentences, UMD split."""

    name = "refcocog"
    version = "umd"
    split = "val, test"
    files = ("refs(umd).p", "instances.json", "train2014|images|.")


def _item(
    ref: dict[str, Any], sentence: dict[str, Any], box: list[float], size: dict[str, Any], pictures: Path
) -> Item:
    left, top, width, height = box
    truth = on_padded_square((left, top, left + width, top + height), size["width"], size["height"])
    return picture_item(
        sentence["sent_id"],
        PROMPT + sentence["sent"],
        pictures / size["file_name"],
        answers=["[" + ", ".join(f"{value:.2f}" for value in truth) + "]"],
        kind=ref["split"],
        meta={"box": list(truth)},
    )
