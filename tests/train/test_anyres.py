"""LLaVA-1.6's tiles: counts and pixels are Hugging Face's and LLaVA's, in batches, packed rows and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.batches.lengths import lengths_of
from milora_data.pictures.load import picture_size
from milora_data.pictures.pixels import PixelMaker, Tiling
from milora_data.records import parse_record
from milora_data.records.record import Turn
from milora_vl import load_model
from milora_vl.models.generate import Prompt, generate
from milora_vl.models.llava import tiling_of
from milora_vl.train.__main__ import main
from support.problems import raises_code
from support.tiny_next import GRIDS, saved, tiny_next
from support.train_runs import losses, training

REAL = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = [(20, 33), (64, 64), (5, 300), (300, 5), (47, 46), (90, 31)]


def tiling(pinpoints: list[list[int]] = GRIDS, tile: int = 32, side: int = 4) -> Tiling:
    return Tiling(tuple((height, width) for height, width in pinpoints), tile, side)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return tiny_next()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number, (height, width) in enumerate(SIZES):
        Image.effect_noise((width, height), 80).convert("RGB").save(tmp_path / f"{number}.png")
    return tmp_path


def record(*numbers: int, answer: str = "Yes.") -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\n" * len(numbers) + "Is it?"}, {"from": "gpt", "value": answer}]
    return {"id": "a", "image": [f"{number}.png" for number in numbers], "conversations": turns}


def collator(processor: Any, folder: Path, **more: Any) -> ImageTextCollator:
    return ImageTextCollator(
        processor.tokenizer, processor.image_processor, image_folder=folder, tiling=tiling(), **more
    )


@settings(max_examples=100, deadline=None)
@example(height=1, width=5000)
@example(height=5000, width=1)
@example(height=671, width=672)
@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
def test_counts_are_those_of_hugging_face(parts: tuple[Any, Any], height: int, width: int) -> None:
    processor = parts[1]
    assert tiling().num_tokens(height, width) == processor._get_number_of_features(height, width, 32, 32) - 1


@settings(max_examples=60, deadline=None)
@given(height=st.integers(20, 4000), width=st.integers(20, 4000))
def test_counts_are_those_of_llava(height: int, width: int) -> None:
    llava_arch = pytest.importorskip("llava.model.llava_arch")
    mm_utils = pytest.importorskip("llava.mm_utils")
    columns, rows = mm_utils.get_anyres_image_grid_shape((width, height), [[w, h] for h, w in REAL], 336)
    feature = llava_arch.unpad_image(torch.empty(1, rows * 24, columns * 24), (width, height))
    theirs = 576 + feature.shape[1] * (feature.shape[2] + 1)
    ours = tiling(REAL, 336, 24)
    assert ours.grid(height, width) == (rows, columns)
    # LLaVA cuts off where HF rounds to 7 digits first: a whole number may come out one smaller, as 1.9999999.
    assert abs(ours.num_tokens(height, width) - theirs) <= 2 * 73 * (theirs != ours.num_tokens(height, width))
    if (height * columns * 24) % width and (width * rows * 24) % height:
        assert ours.num_tokens(height, width) == theirs


def test_pixels_are_hugging_faces_and_llavas(parts: tuple[Any, Any], pictures: Path) -> None:
    mm_utils = pytest.importorskip("llava.mm_utils")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = parts[1]
    batch = collator(processor, pictures)([record(*range(len(SIZES)))])
    opened = [Image.open(pictures / f"{number}.png") for number in range(len(SIZES))]
    theirs = processor.image_processor(images=opened, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], theirs["pixel_values"])
    assert batch["image_sizes"].tolist() == [list(size) for size in SIZES]
    size = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    clip = CLIPImageProcessorPil(**size)
    levels = torch.tensor(clip.image_std)[:, None, None] * 255
    maker = PixelMaker(type(processor.image_processor)(image_grid_pinpoints=REAL, **size), "anyres")
    for height, width in ((1200, 900), (480, 640), (200, 900)):  # levels of 255: two rounded resizes
        photo = Image.effect_noise((width // 16, height // 16), 80).convert("RGB").resize((width, height))
        llava = mm_utils.process_anyres_image(photo, clip, [[w, h] for h, w in REAL])
        difference = ((maker([photo])[0] - llava) * levels).abs()
        assert float(difference.max()) < 2.01
        assert float(difference.mean()) < 0.1


def test_every_kind_of_batch_runs_and_packed_rows_have_its_loss(parts: tuple[Any, Any], pictures: Path) -> None:
    model, processor = parts
    records = [record(0, answer="One."), record(2, 3), record(), record(1, 4, 5, answer="All of them.")]
    make = collator(processor, pictures)

    def loss(batch: Any) -> float:
        labels = batch["labels"][:, 1:]
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))

    with torch.no_grad():
        alone = sum(loss(make([item])) for item in records)
        assert loss(make(records)) == pytest.approx(alone, rel=1e-4)
        assert loss(make([records])) == pytest.approx(alone, rel=1e-4)
    hidden = make([record()])
    assert hidden["pixel_values"].shape[0] == 1
    assert int(hidden["attention_mask"].sum()) < hidden["input_ids"].shape[1]


def test_lengths_know_the_sizes_and_truncation_never_cuts_a_picture(parts: tuple[Any, Any], pictures: Path) -> None:
    processor = parts[1]
    records = [parse_record(record(number)) for number in range(len(SIZES))]
    lengths = lengths_of(records, collator(processor, pictures))
    made = [collator(processor, pictures)([item])["input_ids"].shape[1] for item in records]
    assert lengths == made
    two = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "No."}]
    long = {**record(0), "image": ["0.png", "1.png"], "conversations": [*record(0)["conversations"], *two]}
    cut = collator(processor, pictures, max_length=lengths[0] + 20)([long])
    assert cut["image_sizes"].tolist() == [list(SIZES[0])]
    with Image.open(pictures / "0.png") as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(pictures / "turned.jpg", exif=exif)
    assert picture_size(pictures / "turned.jpg") == SIZES[0][::-1]


def test_answers_are_the_same_alone_and_together(parts: tuple[Any, Any], pictures: Path) -> None:
    model, processor = parts
    prompts = [Prompt((Turn("user", "<image>\nWhat?"),), (pictures / f"{number}.png",)) for number in (0, 1, 2, 0)] + [
        Prompt((Turn("user", "No picture?"),))
    ]
    together = generate(model, processor, prompts, max_new_tokens=5)
    alone = [generate(model, processor, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert together == alone


def test_it_trains_and_answers(tiny_data: Path, tmp_path: Path, capfd: Any) -> None:
    folder = saved(tmp_path / "next")
    extra = ["--model", str(folder), "--rank", "4", "--dropout", "0", "--image_aspect_ratio", "anyres"]
    extra += ["--eval_data_path", str(tiny_data / "val.json"), "--packing", "--max_length", "256", "--max_steps", "4"]
    assert main(training(tiny_data, tmp_path / "run", *extra)) == 0
    said = capfd.readouterr().err
    assert "packed into" in said
    assert "an image takes up to 88 tokens" not in said
    history = losses(tmp_path / "run")
    assert history[-1][1] < history[0][1]
    model, processor = load_model(tmp_path / "run")
    assert tiling_of(model.config) == tiling()
    prompt = Prompt((Turn("user", "<image>\nWhat?"),), (tiny_data / "images" / "0.png",))
    assert len(generate(model, processor, [prompt], max_new_tokens=3)) == 1


def test_the_treatment_of_pictures_must_fit_the_model(tiny_data: Path, tmp_path: Path) -> None:
    with raises_code("image-aspect-ratio", where="--image_aspect_ratio", message="sees a picture once"):
        main(training(tiny_data, tmp_path / "run", "--rank", "4", "--image_aspect_ratio", "anyres"))
    folder = saved(tmp_path / "next")
    with raises_code("image-aspect-ratio", where="--image_aspect_ratio"):
        main(
            training(
                tiny_data, tmp_path / "run", "--model", str(folder), "--rank", "4", "--image_aspect_ratio", "plain"
            )
        )
