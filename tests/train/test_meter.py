"""What a training's log says of the batches that passed."""

from __future__ import annotations

import pytest
from PIL import Image

from milora_data.batches.collate import ImageTextCollator
from milora_vl.foreign.load_model import load_model
from milora_vl.models.loading import split_processor
from milora_vl.train.meter import FIELDS, Meter

TURNS = [{"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "Yes."}]


@pytest.fixture(scope="module")
def collator(tmp_path_factory: pytest.TempPathFactory) -> ImageTextCollator:
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    tokenizer, pictures = split_processor(load_model("tiny")[1])
    return ImageTextCollator(tokenizer, pictures, image_tokens=16, image_folder=folder)


def test_the_hidden_picture_of_a_batch_of_texts_is_not_counted(collator):
    text = {"id": "t", "conversations": TURNS}
    shown = {"id": "p", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nRed?"}, TURNS[1]]}
    for records, images in (([text, text], 0), ([text, shown, shown], 2)):
        meter = Meter(collator)
        batch = collator(records)
        meter.add(batch)
        counted = dict(zip(FIELDS, meter.counts.tolist(), strict=True))
        assert counted["images"] == images
        assert counted["tokens"] == int(batch["attention_mask"].sum())
        assert counted["positions"] == batch["labels"].numel()
