"""Picture files of every kind that data sets are known to hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from milora_data.pictures.load import ImageError, expand_to_square, load_image
from milora_data.pictures.pixels import PixelMaker
from support.problems import raises_code

RED, GREEN = (254, 0, 0), (0, 255, 1)


@pytest.fixture
def two_colours() -> Image.Image:
    image = Image.new("RGB", (16, 8), RED)
    image.paste(GREEN, (8, 0, 16, 8))
    return image


def near(pixel: object, colour: tuple[int, int, int], tolerance: int = 12) -> bool:
    return bool(np.abs(np.subtract(pixel, colour)).max() <= tolerance)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.tiff", "gif-inside.jpg"])
def test_formats_and_wrong_suffixes(two_colours: Image.Image, tmp_path: Path, name: str) -> None:
    two_colours.save(tmp_path / name, format="GIF" if "gif" in name else None)
    loaded = load_image(tmp_path / name)
    assert (loaded.mode, loaded.size) == ("RGB", (16, 8))
    assert near(loaded.getpixel((2, 4)), RED)
    assert near(loaded.getpixel((13, 4)), GREEN)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("L", (8, 8), 255).convert("I").point(lambda v: v * 257) if mode.startswith("I") else None
    image = image.convert(mode) if image else Image.new("L", (8, 8), 255).convert("RGB").convert(mode)
    file = tmp_path / ("a.jpg" if mode == "YCbCr" else "a.tiff")  # Pillow 12.3 cannot read its own TIFF of that mode
    image.save(file)
    loaded = load_image(file)
    assert (loaded.mode, loaded.size) == ("RGB", (8, 8))
    assert near(loaded.getpixel((3, 3)), (255, 255, 255), 1)


def test_sixteen_bit_grey_keeps_its_shades(tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "a.png")
    assert np.abs(np.asarray(load_image(tmp_path / "a.png"))[..., 0].ravel() - np.arange(256.0)).max() <= 1


def test_alpha_is_dropped_as_llava_does(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (*RED, 10)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((1, 1)) == RED


def test_exif_turns_the_picture_upright(two_colours: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    two_colours.save(tmp_path / "a.jpg", exif=exif, quality=95)
    loaded = load_image(tmp_path / "a.jpg")
    assert loaded.size == (8, 16)
    assert near(loaded.getpixel((4, 2)), RED)
    assert near(loaded.getpixel((4, 13)), GREEN)


def broken(name: str, good: bytes) -> bytes:
    return {"empty": b"", "text": b"<html>404</html>", "cut": good[: len(good) // 2], "head": good[:9]}[name]


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
@pytest.mark.parametrize("name", ["empty", "text", "cut", "head"])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(broken(name, path.read_bytes()))
    with raises_code("image-unreadable", says=f"a\\.{suffix}: cannot read this picture: \\w+", kind=ImageError):
        load_image(path)


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
