"""smol-llava learns to answer questions about pictures; forgetting is measured on general text and other pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.pictures.load import Picture
from milora_data.records.record import IMAGE, Record, Turn
from milora_data.stream import load_records
from milora_vl.core.calibration.bases import Calibration, sources_of
from milora_vl.core.calibration.texts import ROWS
from milora_vl.forgetting.answers import answer_batches, drawn_questions
from milora_vl.interop.load_model import load_model
from milora_vl.models.base import split_processor
from milora_vl.models.devices import fastest_dtype
from milora_vl.models.generate import Prompt, generate
from milora_vl.models.llava import image_tokens
from milora_vl.train.start import CAPTION_TOKENS, QUESTION, with_pictures
from studies.tasks import EASY_VQA, EMOJI
from studies.tasks.answers import AnswerTask

CALIBRATION_PICTURES = 64
VALIDATION = 105


class PictureQuestions(AnswerTask):
    """Short answers about held-out pictures of the data set in `folder`.

    Validation and test use one of so many records of their files.
    """

    folder: Path
    validation_every: int
    test_every: int

    def __init__(self) -> None:
        base: Any
        base, processor = load_model("smol-llava", dtype=fastest_dtype(torch.device("cpu")))
        base.set_attn_implementation("eager")  # fastest for short sequences on CPUs
        tokenizer, image_processor = split_processor(processor)
        collator = ImageTextCollator(
            tokenizer, image_processor, image_tokens=image_tokens(base.config), image_folder=self.folder / "images",
            max_length=512,
        )  # fmt: skip
        splits = ("train", "val", "test")
        train, validation, test = (list(load_records(self.folder / f"{split}.json")) for split in splits)
        validation = validation[:: self.validation_every][:VALIDATION]
        with TemporaryDirectory() as folder:
            drawn = drawn_questions(Path(folder))[::4]
            words = [_in_one_word(record) for record in drawn]
            asked = {"pictures": drawn, "words": words, "photos": _photos(Path(folder))}
            probes = {
                name: list(answer_batches(base, processor, records, image_folder=Path(folder)))
                for name, records in asked.items()
            }
        super().__init__(base, collator, train, validation, test[:: self.test_every], probes)
        self.processor = processor

    @cached_property
    def _described(self) -> list[Mapping[str, Tensor]]:
        """Pictures of the training set with captions that the base model writes."""
        chosen = with_pictures(self.train, CALIBRATION_PICTURES, self.folder / "images")
        asks = Turn("user", f"{IMAGE}\n{QUESTION}")
        prompts = [Prompt((asks,), record.within(self.folder / "images").images) for record in chosen]
        captions = generate(self.base, self.processor, prompts, max_new_tokens=CAPTION_TOKENS)
        records = [
            replace(record, turns=(asks, Turn("assistant", caption.text)))
            for record, caption in zip(chosen, captions, strict=True)
        ]
        batches = (self.collator(records[start : start + ROWS]) for start in range(0, len(records), ROWS))
        return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]

    def calibration(self) -> Calibration:
        """Return texts and captions of training pictures, both written by the base model itself."""
        if self.calibrated is not None:
            return self.calibrated
        return [*chain(*sources_of(super().calibration())), *self._described]


def _in_one_word(record: Record) -> Record:
    """Return a question about the same picture whose answers are of another form than a sentence."""
    return replace(record, turns=(Turn("user", f"{IMAGE}\nName the shape in one word, in capital letters."),))


def _photos(folder: Path) -> list[Record]:
    """Write 24 pieces of the two photographs in scikit-learn to `folder`, and return a question about each."""
    from sklearn.datasets import load_sample_images

    records = []
    for number, photograph in enumerate(load_sample_images().images):
        for crop in range(12):
            top, left = crop // 4 * 133, crop % 4 * 142
            name = f"photo_{number}_{crop}.png"
            Image.fromarray(photograph[top : top + 160, left : left + 213]).save(folder / name)
            turn = Turn("user", f"{IMAGE}\nDescribe this picture in one sentence.")
            records.append(Record(name, (Picture(name),), (turn,), source=name))
    return records


class EmojiQuestions(PictureQuestions):
    """The demo's task."""

    folder = EMOJI
    validation_every, test_every = 1, 2


class EasyVqa(PictureQuestions):
    """easy-VQA with its official split, a task that no one here made."""

    folder = EASY_VQA
    validation_every, test_every = 31, 37  # a picture has about ten questions: these steps reach each of them
