"""The picture probe of forgetting: drawn pictures, questions about them, and the base model's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from milora_data.encode.tokens import IGNORE
from milora_data.pictures.load import Picture
from milora_data.pictures.pixels import AspectRatio
from milora_data.records.record import IMAGE, Record, Turn
from milora_vl.common.progress import progress_bar
from milora_vl.forgetting.measure import Forgetting, ProbeBatch, compare_on
from milora_vl.models.collator_for import collator_for
from milora_vl.models.generate import Prompt, generate
from milora_vl.models.llava import uses_processor

if TYPE_CHECKING:
    from torch import Tensor

_COLOURS = {"red": "#d62728", "green": "#2ca02c", "blue": "#1f5fd6", "yellow": "#f2c500", "black": "#111111"}
_SHAPES = ("circle", "square", "triangle", "star")
_QUESTIONS = (
    "Describe this picture in one sentence.",
    "What is the colour of the shape?",
    "What shape is shown?",
    "Is there a dog in the picture? Answer yes or no.",
)


def drawn_questions(folder: Path) -> list[Record]:
    """Draw 20 plain shapes as PNG files in `folder` and return 80 questions about them. This probe needs no data."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for colour, code in _COLOURS.items():
        for shape in _SHAPES:
            name = f"{colour}_{shape}.png"
            _draw(shape, code).save(folder / name)
            records += [
                Record(f"{name}:{number}", (Picture(name),), (Turn("user", f"{IMAGE}\n{question}"),), source=name)
                for number, question in enumerate(_QUESTIONS)
            ]
    return records


def measure_on_answers(
    model: Any,
    processor: Any,
    *,
    base: Any | None = None,
    records: Sequence[Record] | None = None,
    image_folder: Path | None = None,
    template: str = "vicuna_v1",
    image_aspect_ratio: AspectRatio = "pad",
    batch_size: int = 8,
    limit: int | None = None,
) -> Forgetting:
    """Compare `model` with its base (see `measure_forgetting`) on the base's answers to the first questions of records.

    Without records, the questions are about drawn shapes. At most `limit` questions are asked.
    """
    with TemporaryDirectory() as drawn:
        folder = image_folder if records and image_folder is not None else Path(drawn)
        asked = (records or drawn_questions(folder))[:limit]
        batches = list(answer_batches(
            model if base is None else base, processor, asked, image_folder=folder, without_adapter=base is None,
            template=template, image_aspect_ratio=image_aspect_ratio, batch_size=batch_size,
        ))  # fmt: skip
    what = f"answers to {len(asked):,} questions" + ("" if records else " about drawn shapes")
    return compare_on(batches, model, base=base, what=what)


def answer_batches(
    model: Any,
    processor: Any,
    records: Sequence[Record],
    *,
    image_folder: Path,
    without_adapter: bool = False,
    template: str = "vicuna_v1",
    image_aspect_ratio: AspectRatio = "pad",
    max_new_tokens: int = 16,
    batch_size: int = 8,
) -> Iterator[ProbeBatch]:
    """Yield the first question of each record with the greedy answer of `model`. Only the ids of the answer count.

    Questions about one picture belong to one document, because they are not independent. A record without a picture is
    a separate document. `without_adapter` asks the base model of a PeftModel. The answers in the records are ignored.
    """
    asked = [replace(record, turns=(*_until_question(record),)).within(image_folder) for record in records]
    context: AbstractContextManager[None] = model.disable_adapter() if without_adapter else nullcontext()
    with context, progress_bar("answers of the base", len(asked), "questions") as bar:
        answers = generate(
            model, processor,
            [Prompt(record.turns, record.images, videos=record.videos) for record in asked],
            template=template, max_new_tokens=max_new_tokens, batch_size=batch_size,
            image_aspect_ratio=image_aspect_ratio, on_batch=lambda indices, _: bar.update(len(indices)),
        )  # fmt: skip
    own = uses_processor(model.config)
    options: dict[str, Any] = {} if own else {"template": template, "image_aspect_ratio": image_aspect_ratio}
    collate = collator_for(model, processor, image_folder=image_folder, **options)
    answered = [replace(r, turns=(*r.turns, Turn("assistant", a.text))) for r, a in zip(asked, answers, strict=True)]
    # Separate batches for records with and without pictures, because a batch has pictures in all rows or in none.
    for group in ([r for r in answered if r.images], [r for r in answered if not r.images]):
        for start in range(0, len(group), batch_size):
            yield _batch(collate, group[start : start + batch_size])


def _batch(collate: Any, records: Sequence[Record]) -> ProbeBatch:
    inputs: dict[str, Tensor] = collate(records)
    labels = inputs.pop("labels")
    documents = [" ".join(map(str, record.images)) or f"{record.source} {record.id}" for record in records]
    return ProbeBatch(inputs, labels[:, 1:] != IGNORE, documents)


def _until_question(record: Record) -> Iterator[Turn]:
    for turn in record.turns:
        if turn.role == "assistant":
            return
        yield turn


def _draw(shape: str, colour: str, side: int = 160) -> Image.Image:
    picture = Image.new("RGB", (side, side), "white")
    pen, low, high, middle = ImageDraw.Draw(picture), side * 0.2, side * 0.8, side / 2
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=colour)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=colour)
    elif shape == "triangle":
        pen.polygon([(middle, low), (low, high), (high, high)], fill=colour)
    else:
        pen.regular_polygon((middle, middle, side * 0.34), 3, fill=colour)
        pen.regular_polygon((middle, middle, side * 0.34), 3, rotation=180, fill=colour)
    return picture
