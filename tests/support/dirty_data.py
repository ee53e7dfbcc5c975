"""A folder of known faults of data sets: more than forty kinds, each in its own record."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Saver = Callable[[Path], None]


def photo(size: tuple[int, int] = (48, 36)) -> Image.Image:
    return Image.merge("RGB", [Image.effect_noise(size, 60) for _ in range(3)])


def bytes_of(suffix: str, folder: Path) -> bytes:
    path = folder / f"sound.{suffix}"
    photo().save(path)
    content = path.read_bytes()
    path.unlink()
    return content


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in 100 bytes: a header and hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(path, exif=exif)


def animated(path: Path) -> None:
    photo().save(path, save_all=True, append_images=[photo(), photo()])


# name -> how the file is made
UNREADABLE: dict[str, Saver] = {
    "zero.jpg": lambda path: path.write_bytes(b"") and None,
    "html.jpg": lambda path: path.write_text("<html>404 Not Found</html>") and None,
    "cut.jpg": lambda path: path.write_bytes(bytes_of("jpg", path.parent)[:-400]) and None,
    "cut.png": lambda path: path.write_bytes(bytes_of("png", path.parent)[:300]) and None,
    "head.jpg": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0") and None,
    "garbled.png": lambda path: path.write_bytes(bytes_of("png", path.parent)[:60] + b"\0" * 500) and None,
    "bomb.png": lambda path: path.write_bytes(bomb()) and None,
    "folder.png": lambda path: path.mkdir(),
    "pipe.png": lambda path: os.mkfifo(path),
}
# name -> how the file is made, which can be read
PECULIAR: dict[str, Saver] = {
    "animated.gif": animated,
    "rotated.jpg": rotated,
    "alpha.png": lambda path: photo().convert("RGBA").save(path),
    "palette.png": lambda path: photo().convert("P").save(path, transparency=bytes([0] * 100)),
    "long.png": lambda path: Image.new("RGB", (5000, 1)).save(path),
    "tall.png": lambda path: Image.new("L", (1, 5000)).save(path),
}


def ask(*texts: str, image: Any = None, **more: Any) -> dict[str, Any]:
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns, **({} if image is None else {"image": image}), **more}


# what `check` calls it -> a record; the first group cannot be used at all
BROKEN: list[tuple[str, Any]] = [
    ("turn_order", {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}),
    ("no_answer", ask("Alone?")),
    ("no_answer", {"conversations": []}),
    ("placeholders", ask("<image>\nWhere is it?", "Nowhere.")),
    ("placeholders", ask("<image>\n<image>\n<image>\nThree?", "Two.", image=["0.png", "1.png"])),
    ("missing_picture", ask("<image>\nGone?", "Yes.", image="gone.png")),
    ("missing_picture", ask("<image>\nLong?", "Too long for a file system.", image="a" * 300 + ".png")),
    ("missing_picture", ask("<image>\nNul?", "No name.", image="nul\0.png")),
    ("broken_text", ask("Half \ud83d?", "Yes.")),
    ("not_a_record", {"text": "something else"}),
    ("not_a_record", {"conversations": [{"from": "narrator", "value": "Once"}]}),
    ("not_a_record", {"conversations": [{"from": "human"}]}),
    ("not_a_record", ["a", "list"]),
    ("not_a_record", ask("<image>\na", "b", image=17)),
    ("not_a_record", {"messages": [{"role": ["user"], "content": "a"}]}),
    ("not_a_record", {"messages": [], "images": 17}),
]
# lines that are no JSON; each costs itself alone
LINES: list[bytes] = [
    b'{"id": "latin-1", "conversations": [{"from": "human", "value": "caf\xe9"}]}',
    b'{"id": ' + b"9" * 5000 + b"}",
    b'{"id": "broken", "conversations": [}',
]
ODD: list[tuple[str, Any]] = [
    ("empty_answer", ask("Nothing?", "")),
    ("empty_question", ask("", "Something.")),
    ("answer_first", {"conversations": [{"from": "gpt", "value": "Hello!"}, *ask("Who?", "Me.")["conversations"]]}),
    ("unanswered", ask("One?", "Two.", "Three?")),
    ("special_token", ask("What is </s>?", "The end.")),
    ("forgotten", ask("Bell\x07?", "Yes.")),
    ("forgotten", ask("What is it?", "A thing.", image="1.png")),
    ("unanswered", {"messages": [{"role": role, "content": "Hm?"} for role in ("user", "assistant", "user")]}),
]


def make(folder: Path) -> Path:
    """Write images/ and train.jsonl below `folder`; returns the latter. Good records come between the others."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(4):
        photo().save(images / f"{number}.png")
    lines: list[Any] = [ask(f"<image>\nWhat is in {n}?", f"Thing {n}.", image=f"{n}.png", id=f"g{n}") for n in range(4)]
    lines += [ask("Is it so?", "It is.", id="good"), ask("Once?", "Yes.", id="same")]
    for name, save in UNREADABLE.items():
        save(images / name)
        lines.append(ask(f"<image>\n{name}?", "Unreadable.", image=name, id=name))
    for name, save in PECULIAR.items():
        save(images / name)
        lines.append(ask(f"<image>\n{name}?", "Peculiar.", image=name, id=name))
    lines += [record for _, record in [*BROKEN, *ODD]]
    text = "\n".join([*map(json.dumps, lines), ""]).replace("\n", "\r\n", 5).encode()
    path = folder / "train.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + text.replace(b"\n", b"\n" + LINES[0] + b"\n", 1) + b"\n".join(LINES[1:]) + b"\n\n"
    )
    return path
