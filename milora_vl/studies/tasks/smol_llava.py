"""smol-llava learns to answer questions about emoji; it may forget general text and other pictures."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from milora_data.collate import ImageTextCollator
from milora_data.records import load_records
from milora_vl.forgetting import answer_batches, drawn_questions
from milora_vl.load import load_model
from milora_vl.models.image_tokens import image_tokens
from milora_vl.models.loading import split_processor
from milora_vl.studies.tasks import EMOJI
from milora_vl.studies.tasks.answers import AnswerTask


class EmojiQuestions(AnswerTask):
    """The demo's task (`python -m milora_data emoji`): short answers about pictures that training has not shown.

    Every fourth question of the test set is asked.
    """

    def __init__(self) -> None:
        base: Any
        base, processor = load_model("smol-llava", dtype=torch.bfloat16)
        base.set_attn_implementation("eager")  # for short sequences on CPUs
        tokenizer, image_processor = split_processor(processor)
        collator = ImageTextCollator(
            tokenizer, image_processor, image_tokens=image_tokens(base.config), image_folder=EMOJI / "images",
            max_length=512,
        )  # fmt: skip
        train, validation, test = (list(load_records(EMOJI / f"{split}.json")) for split in ("train", "val", "test"))
        with TemporaryDirectory() as folder:
            drawn = drawn_questions(Path(folder))[::4]
            pictures = list(answer_batches(base, processor, drawn, image_folder=Path(folder)))
        super().__init__(base, collator, train, validation[:64], test[::4], {"pictures": pictures})
