"""SmolLM2 learns to name the topic of a name, about sixty topics; forgetting is measured on general text."""

from __future__ import annotations

from typing import Any

import torch

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.records.record import Record, Turn
from milora_vl.interop.adapters.load_model import load_model
from milora_vl.models.devices import fastest_dtype
from studies.tasks.answers import AnswerTask
from studies.tasks.topics import named_topics

NUM_VALIDATION, NUM_TEST = 96, 240


class NamedTopics(AnswerTask):
    """The same names and topics as for MiniLM-L6; the test uses held-out names."""

    def __init__(self, name: str = "smollm2") -> None:
        base: Any
        base, tokenizer = load_model(name, dtype=fastest_dtype(torch.device("cpu")))
        base.set_attn_implementation("eager")  # fastest for short sequences on CPUs
        records = [_record(name, topic) for name, topic in named_topics()]
        test, validation = records[:NUM_TEST], records[NUM_TEST : NUM_TEST + NUM_VALIDATION]
        collator = ImageTextCollator(tokenizer, template="tulu", max_length=512)
        super().__init__(base, collator, records[NUM_TEST + NUM_VALIDATION :], validation, test, probes={})


def _record(name: str, topic: str) -> Record:
    turns = (Turn("user", f"What is the topic of: {name}"), Turn("assistant", topic.replace("-", " ")))
    return Record(name, (), turns)
