"""Models of `vlm_families` as folders, and records with pictures of several sizes for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from support.vlm_families import model_of, processor_of

SIZES = ((30, 20), (64, 17), (16, 40), (33, 33))


def write_model(name: str, folder: Path) -> Path:
    """Write the tiny model of a family and its processor to a folder."""
    processor = processor_of(name)
    model_of(name, processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def record(turns: list[tuple[str, str]], images: list[str], number: int = 0) -> dict[str, Any]:
    """Return a LLaVA record of (role, text)."""
    pictures = {"image": images} if images else {}
    return {"id": str(number), **pictures, "conversations": [{"from": who, "value": text} for who, text in turns]}


def write_pictures(folder: Path) -> Path:
    """Write pictures 0.png, 1.png, ... of noise, of the sizes SIZES."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{number}.png")
    return folder


def mixed_records(*, single: bool = False) -> list[dict[str, Any]]:
    """Return records with one picture, several, none; with `single`, one question with a picture each."""
    one = [
        record([("human", f"<image>\nWhat is {number}?"), ("gpt", "A cat." * (number % 3 + 1))], [f"{number % 4}.png"])
        for number in range(6)
    ]
    if single:
        return [value | {"id": str(number)} for number, value in enumerate(one)]
    more = [
        record([("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Sure?\n"), ("gpt", " Yes.")], ["0.png"]),
        record([("human", "Hi"), ("gpt", "Hello there")], []),
        record([("human", "<image>\n<image>\nLike <image> it?"), ("gpt", "No")], ["1.png", "2.png", "3.png"]),
    ]
    return [value | {"id": str(number)} for number, value in enumerate(one[:3] + more)]


def write_records(path: Path, *, single: bool = False) -> Path:
    """Write `mixed_records` to a file."""
    path.write_text(json.dumps(mixed_records(single=single)))
    return path
