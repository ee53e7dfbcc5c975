"""Boxes in pixels of the file become what each family means, in training, in prompts, and back from its answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from milora_data import show
from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.batches.processor_collator import ProcessorCollator
from milora_data.check import examine
from milora_data.pictures.load import load_image
from milora_data.records import parse_record
from milora_data.records.boxes import Boxes
from milora_data.records.record import Turn
from milora_vl.common.errors import DataError
from milora_vl.models.generate import LlavaReader, ProcessorReader, Prompt
from milora_vl.models.tiny import tiny_llava
from support.problems import raises_code
from support.versions import needs_spans
from support.vlm_families import processor_of

HIGH, WIDE = 428, 640
PIXELS = [146.0, 137.0, 615.0, 415.0]
# QwenLM/Qwen3-VL, qwen-vl-finetune/tools/process_bbox.ipynb, has these numbers for this box; the others are computed
# from OpenGVLab/InternVL#285, zai-org/GLM-V, big_vision's segmentation.py (paligemma) and haotian-liu/LLaVA#606.
WRITTEN = {
    "qwen2_vl": "<|box_start|>(228,320),(961,970)<|box_end|>",
    "qwen2_5_vl": "[147, 134, 619, 407]",  # of the notebook's limits
    "qwen3_vl": "[228, 320, 961, 970]",
    "internvl": "<box>[[228, 320, 961, 970]]</box>",
    "glm4v": "[228, 320, 961, 970]",
    "paligemma": "<loc0327><loc0233><loc0992><loc0983>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (WIDE, HIGH)).save(path / "a.png")
    turned = Image.new("RGB", (HIGH, WIDE))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(path / "turned.jpg", exif=exif)
    return path


def value(*boxes: Any, image: str = "a.png", **others: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "<image>Where is <ref-object>?"}, {"role": "assistant", "content": "<bbox>."}]
    return {"messages": turns, "images": [image], "objects": {"ref": ["it"], "bbox": list(boxes) or [PIXELS], **others}}


def answer(collator: Any, record: dict[str, Any]) -> str:
    return "".join(part.text for part in collator.segments(parse_record(record)) if part.supervised)


@needs_spans
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("image", ["a.png", "turned.jpg"])
def test_a_box_in_pixels_is_written_as_the_family_means_it(name: str, image: str, folder: Path) -> None:
    processor = processor_of(name)
    collator = ProcessorCollator(processor, image_folder=folder)
    written = WRITTEN[name]
    if name == "qwen2_5_vl":
        notebook = type(processor.image_processor)(min_pixels=56 * 56, max_pixels=14 * 14 * 4 * 1280)
        marked = "<bbox 0: 146 137 615 415>"
        assert Boxes("Qwen2_5_VLProcessor", notebook).written(marked, [(HIGH, WIDE)]) == written
        # In pixels of the picture that this processor resized.
        grid = processor.image_processor(images=[load_image(folder / image)], return_tensors="pt")["image_grid_thw"]
        high, wide = (int(count) * processor.image_processor.patch_size for count in grid[0, 1:])
        scales = [wide / WIDE, high / HIGH] * 2
        written = str([round(pixel * scale) for pixel, scale in zip(PIXELS, scales, strict=True)])
    assert answer(collator, value(image=image)).startswith(f"{written}.")
    decoded = re.sub(r"</?[|a-z_]+>", "", written)  # without special tokens
    back = Boxes.of(processor).read(f"Here: {decoded}.", (HIGH, WIDE))
    assert json.loads(back[6:-1]) == pytest.approx(PIXELS, abs=4 if name == "qwen2_5_vl" else 1)
    asked = Prompt((Turn("user", "<image>What is at <bbox 0: 146 137 615 415>?"),), (folder / image,))
    assert f"at {written}?" in ProcessorReader(None, processor).rendered(asked).text
    collator([value(image=image)])


def test_a_box_of_llava_is_a_part_of_the_padded_square(folder: Path) -> None:
    model, processor = tiny_llava()
    parts = {"image_token_id": processor.tokenizer.convert_tokens_to_ids("<image>"), "image_tokens": 16}
    collator = ImageTextCollator(processor.tokenizer, processor.image_processor, image_folder=folder, **parts)
    assert answer(collator, value()) == " [0.23, 0.38, 0.96, 0.81].</s>"  # (137 + 106) / 640 = 0.38
    back = Boxes("LLaVA (pad)").read("[0.23, 0.38, 0.96, 0.81]", (HIGH, WIDE))
    assert json.loads(back) == pytest.approx(PIXELS, abs=5)
    asked = Prompt((Turn("user", "<image>What is at <bbox 0: 146 137 615 415>?"),), (folder / "a.png",))
    ids = LlavaReader(model, processor, "vicuna_v1", "pad")._ids(asked)
    assert "at [0.23, 0.38, 0.96, 0.81]?" in processor.tokenizer.decode(ids)
    cropped = ImageTextCollator(
        processor.tokenizer, processor.image_processor, image_folder=folder, image_aspect_ratio="plain", **parts
    )
    with raises_code("record-box", message="LLaVA (plain)", where="record ''", kind=DataError):
        cropped([value()])


@needs_spans
def test_a_point_and_a_family_without_a_source(folder: Path) -> None:
    click = value([320, 214])
    assert answer(ProcessorCollator(processor_of("qwen3_vl"), image_folder=folder), click).startswith("[500, 500].")
    for name, record in (("gemma3", value()), ("internvl", click)):
        with raises_code("record-box", message="no source says", kind=DataError):
            ProcessorCollator(processor_of(name), image_folder=folder)([record])
    collator = ProcessorCollator(processor_of("qwen3_vl"), image_folder=folder)
    with raises_code("record-box", message="[0, 0, 700, 10]", where="record ''", kind=DataError):
        collator([value([0, 0, 700, 10])])
    assert [collator.may_refuse(parse_record(one)) for one in (value(), value([0, 0, 700, 10]))] == [False, True]


@pytest.mark.parametrize(
    "record", [value(PIXELS, PIXELS), value(image_id=[1]), value([1, 2, 3]), value(bbox_type="norm1"), value("left")]
)
def test_boxes_that_do_not_fit_their_record_are_refused(record: dict[str, Any]) -> None:
    with raises_code("record-box", kind=DataError):
        parse_record(record)


def test_show_draws_boxes_and_check_finds_nothing(folder: Path) -> None:
    record = parse_record(value())
    assert list(examine(record)) == []
    assert ("learnt", " [146, 137, 615, 415].</s>") in [tuple(piece) for piece in show.pieces_of(record)]
    picture = Image.new("RGB", (WIDE, HIGH))
    show._draw(picture, [PIXELS])
    assert picture.getpixel((146, 200)) == (255, 0, 0)
    assert picture.getpixel((100, 200)) == (0, 0, 0)
