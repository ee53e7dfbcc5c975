"""Draw pictures for the tests, and write small data files."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220)}
NAMES = tuple(COLOURS)


def picture(colour: str, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A disc of one colour on grey."""
    image = Image.new("RGB", size, (128, 128, 128))
    ImageDraw.Draw(image).ellipse((8, 4, 32, 28), fill=COLOURS[colour])
    return image


def draw(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour).save(path)


def encoded(colour: str, size: tuple[int, int] = (48, 32), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(colour, size).save(buffer, kind)
    return buffer.getvalue()


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def dump_lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def coco(number: int, year: str = "val2014") -> str:
    return f"COCO_{year}_{number:012d}.jpg"


def votes(answer: str) -> list[dict[str, Any]]:
    said = [answer] * 7 + ["the other"] * 3
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i + 1} for i, text in enumerate(said)]


def write_tiny_data(folder: Path, records: list[dict[str, Any]]) -> Path:
    """Write the records as train.json, the first of them as val.json, and eight pictures of several sizes."""
    rng = random.Random(0)
    for i in range(8):
        size = (rng.randint(20, 60), rng.randint(20, 60))
        colour = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (240, 240, 240)][i % 4]
        Image.new("RGB", size, colour).save(made(folder / "images") / f"{i}.png")
    dump(folder / "train.json", records)
    dump(folder / "val.json", records[:4])
    return folder


def made(folder: Path) -> Path:
    """Return a folder that exists."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder
