"""Pixel values: those of the model's image processor bit for bit, LLaVA's within 1/255, for pictures of any shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from milora_data.pictures.load import expand_to_square
from milora_data.pictures.pixels import PixelMaker

SIZE: dict[str, Any] = {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}
SHAPES = [(160, 120), (120, 160), (84, 84), (90, 31), (31, 90), (40, 20), (20, 40), (500, 3), (3, 500), (1, 5), (5, 1)]


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise(size, 80) for _ in range(3)])


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("kind", [CLIPImageProcessor, LlavaImageProcessor])
def test_padded_pictures_are_the_processors_own_bit_for_bit(size: tuple[int, int], kind: Any) -> None:
    processor = kind(**SIZE)
    make, image = PixelMaker(processor), noise(size)
    whole = processor(images=[expand_to_square(image, make.color)], return_tensors="pt")["pixel_values"]
    assert torch.equal(make([make.prepare(image)]), whole)
    if kind is LlavaImageProcessor:
        assert torch.equal(whole, processor(images=[image], do_pad=True, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 333), (400, 400)])
def test_pixels_are_llavas_within_one_level(size: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip("llava")
    from llava.mm_utils import expand2square

    noise(size).save(tmp_path / "a.jpg")
    slow = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    picture = Image.open(tmp_path / "a.jpg").convert("RGB")
    square = expand2square(picture, tuple(int(x * 255) for x in slow.image_mean))
    theirs = slow.preprocess(square, return_tensors="pt")["pixel_values"]
    make = PixelMaker(LlavaImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}))
    ours = make([make.read(tmp_path / "a.jpg")])
    std = torch.tensor(make.image_processor.image_std)[:, None, None]
    levels = ((ours - theirs).abs() * std * 255).round()
    # Each library rounds both passes of a resize for itself: in pure noise a few pixels of a million differ by two.
    assert levels.max() <= 2
    assert (levels > 1).float().mean() < 1e-5
