"""Boxes and points of records, in pixels of the file, and the numbers and texts that each family of models means.

Records have them in ms-swift's form: `<bbox>` in a text, and {"objects": {"bbox": [[x1, y1, x2, y2], [x, y]]}}. Turns
have a mark in its place, `<bbox PICTURE: X1 Y1 X2 Y2>`, which collators and prompts write as the model does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from string import Formatter
from typing import Any, Literal, NamedTuple

from milora_vl.common.errors import DataError

BOX, REF = "<bbox>", "<ref-object>"
MARK = re.compile(r"<bbox ([0-9]+):((?: [-+.0-9e]+)+)>")
KEYS = ("ref", "bbox", "bbox_type", "image_id")
Size = tuple[int, int]
"""Height and width in pixels."""
XY = tuple[float, float]


_POINT = "[{x1}, {y1}]"


class BoxForm(NamedTuple):
    """How a family writes a box and a point (None: no source says), and what its numbers mean.

    `thousandths` and `bins` (0 to 1023) are of the width and the height, `resized` are pixels of the picture as the
    processor resizes it, `square` are parts of the side of the picture padded to a square.
    """

    unit: Literal["thousandths", "bins", "resized", "square"]
    box: str = "[{x1}, {y1}, {x2}, {y2}]"
    point: str | None = None


# By the class of the processor, and by the shape of LLaVA's pictures; docs/data.md names the sources.
FORMS = {
    "LLaVA (pad)": BoxForm("square"),
    "Qwen2VLProcessor": BoxForm(
        "thousandths", "<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>", "<|box_start|>({x1},{y1})<|box_end|>"
    ),
    "Qwen2_5_VLProcessor": BoxForm("resized", point=_POINT),
    "Qwen3VLProcessor": BoxForm("thousandths", point=_POINT),
    "InternVLProcessor": BoxForm("thousandths", "<box>[[{x1}, {y1}, {x2}, {y2}]]</box>"),
    "Glm4vProcessor": BoxForm("thousandths"),
    "Glm46VProcessor": BoxForm("thousandths"),
    "PaliGemmaProcessor": BoxForm("bins", "<loc{y1:04d}><loc{x1:04d}><loc{y2:04d}><loc{x2:04d}>"),
}


def marked(texts: Sequence[str], objects: object, num_images: int) -> list[str]:
    """Return the texts of a record with a mark for each `<bbox>` and the reference for each `<ref-object>`.

    Raises `DataError` if `objects` is not in ms-swift's form, or if the numbers of boxes and `<bbox>` differ.
    """
    try:
        found: Any = json.loads(objects) if isinstance(objects, str) else objects
        boxes = [[float(number) for number in box] for box in found["bbox"]]
        pictures = [int(number) for number in found.get("image_id") or ()] or [0] * len(boxes)
        refs = list(map(str, found.get("ref") or ()))
        others = [key for key in found if key not in KEYS and found[key]]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise _wrong(f"not in the form of ms-swift: {objects!r:.80}") from None
    text = "".join(texts)
    for what, mark, number in (("bbox", BOX, len(boxes)), ("ref", REF, len(refs))):
        if text.count(mark) != number:
            raise _wrong(f'{text.count(mark)} {mark} in the conversation, but {number} in "{what}"')
    if others or found.get("bbox_type") not in (None, "", "real"):
        raise _wrong(f'expected pixels of the file ("bbox_type": "real") and the keys {", ".join(KEYS)}')
    if not all(len(box) in (2, 4) for box in boxes) or not all(0 <= n < num_images for n in pictures):
        raise _wrong("expected [x, y] or [x1, y1, x2, y2], and the number of a picture of the record for each")
    if len(pictures) != len(boxes):
        raise _wrong(f'{len(pictures)} numbers in "image_id", expected {len(boxes)}')
    marks = (f"<bbox {n}: {' '.join(format(x, 'g') for x in box)}>" for n, box in zip(pictures, boxes, strict=True))
    names = iter(refs)
    return [re.sub(f"{BOX}|{REF}", lambda m: next(marks if m.group() == BOX else names), text) for text in texts]


class Boxes:
    """Writes the boxes of records as a model does, and reads the boxes of its answers.

    >>> Boxes("Qwen3VLProcessor").written("It is at <bbox 0: 10 20 50 100>.", [(200, 100)])
    'It is at [100, 100, 500, 500].'
    >>> Boxes("Qwen3VLProcessor").read("It is at [100, 100, 500, 500].", (200, 100))
    'It is at [10, 20, 50, 100].'
    """

    def __init__(self, family: str, image_processor: Any = None) -> None:
        self.family = family
        self.image_processor = image_processor

    @classmethod
    def of(cls, processor: Any) -> Boxes:
        """Return the boxes of the model of a processor (transformers')."""
        return cls(type(processor).__name__, getattr(processor, "image_processor", None))

    def written(self, text: str, sizes: Sequence[Size]) -> str:
        """Return a text with its boxes as the model writes them; `sizes` are the sizes of the pictures of the record.

        Raises `DataError` for a family whose form is not known, and for a box outside of its picture.
        """
        return MARK.sub(lambda mark: self._written(_numbers(mark), sizes[int(mark[1])]), text)

    def read(self, text: str, size: Size) -> str:
        """Return an answer with its boxes as [x1, y1, x2, y2] in pixels of the picture, which has this size."""
        plain = re.sub(r"</?\|?[a-z_]+\|?>", "", self.form().box)  # decoding skips special tokens
        pattern = "".join(
            re.escape(before).replace(r",\ ", r",\s*") + (rf"(?P<{name}>[0-9]+(?:\.[0-9]+)?)" if name else "")
            for before, name, _, _ in Formatter().parse(plain)
        )
        scale, shift, _ = self._grid(size)

        def pixels(found: re.Match[str]) -> str:
            corners = [float(found[name]) for name in ("x1", "y1", "x2", "y2")]
            return in_pixels([round((x - shift[n % 2]) / scale[n % 2], 2) for n, x in enumerate(corners)])

        return re.sub(pattern, pixels, text)

    def form(self) -> BoxForm:
        """Return how the family writes boxes. Raises `DataError` if no source says it."""
        if self.family not in FORMS:
            hint = f"known: {', '.join(FORMS)}; for others, write the numbers into the text"
            raise DataError(f"no source says how models of {self.family} write boxes", code="record-box", hint=hint)
        return FORMS[self.family]

    def _written(self, numbers: Sequence[float], size: Size) -> str:
        form, (scale, shift, top) = self.form(), self._grid(size)
        text = form.box if len(numbers) == 4 else form.point
        if text is None:
            raise _wrong(f"no source says how models of {self.family} write points")
        # One pixel of tolerance: annotations count from 0 or from 1.
        if not all(-1 <= x <= size[1 - index % 2] + 1 for index, x in enumerate(numbers)) or any(
            first > last for first, last in zip(numbers[:2], numbers[2:], strict=False)
        ):
            raise _wrong(f"{in_pixels(numbers)} is no box in a picture of {size[1]} x {size[0]} pixels")
        values: dict[str, Any] = {}
        for index, number in enumerate(numbers):
            value = max(0.0, min(number * scale[index % 2] + shift[index % 2], top[index % 2]))
            key = "xy"[index % 2] + "12"[index // 2]
            values[key] = f"{value:.2f}" if form.unit == "square" else round(value)
        return text.format(**values)

    def _grid(self, size: Size) -> tuple[XY, XY, XY]:
        """Return scale, shift and largest value of x and y: a pixel x is x * scale + shift to the model."""
        (height, width), unit = size, self.form().unit
        if unit == "square":
            side = max(size)
            return (1 / side, 1 / side), ((side - width) // 2 / side, (side - height) // 2 / side), (1, 1)
        if unit == "resized":
            high, wide = _resized(size, self.image_processor)
            return (wide / width, high / height), (0, 0), (wide - 1, high - 1)
        top = 1023 if unit == "bins" else 1000
        return (top / width, top / height), (0, 0), (top, top)


def in_pixels(numbers: Sequence[float]) -> str:
    return f"[{', '.join(format(number, 'g') for number in numbers)}]"


def with_pixels(text: str) -> str:
    """Return a text with its boxes as lists of pixels of the file."""
    return MARK.sub(lambda mark: in_pixels(_numbers(mark)), text)


def boxes_in(texts: Iterable[str]) -> Iterator[tuple[int, list[float]]]:
    """Yield the number of the picture and the pixels of each box in the texts of a record."""
    for mark in MARK.finditer("".join(texts)):
        yield int(mark[1]), _numbers(mark)


def require_no_boxes(texts: Iterable[str]) -> None:
    """Raise `DataError` for a box that no family's form has replaced."""
    if any(MARK.search(text) for text in texts):
        raise _wrong("boxes depend on the model's family, which is not known here; write the numbers into the text")


def _numbers(mark: re.Match[str]) -> list[float]:
    return list(map(float, mark[2].split()))


def _resized(size: Size, image_processor: Any) -> Size:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    factor, limits = image_processor.patch_size * image_processor.merge_size, image_processor.size
    height, width = smart_resize(*size, factor, limits["shortest_edge"], limits["longest_edge"])
    return int(height), int(width)


def _wrong(message: str) -> DataError:
    return DataError(f"boxes: {message}", code="record-box")
