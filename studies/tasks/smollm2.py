"""SmolLM2 learns short answers about names and colors; forgetting is measured on general text.

The topic of a name is the task of most studies. Its group and the hue of a color follow it in `studies/sequence.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from milora_data.batches.image_text_collator import ImageTextCollator
from milora_data.records.record import Record, Turn
from milora_vl.interop.load_model import load_model
from milora_vl.models.devices import fastest_dtype
from studies.tasks.answers import AnswerTask
from studies.tasks.colors import named_hues
from studies.tasks.topics import named_groups, named_topics

NUM_VALIDATION, NUM_TEST = 96, 240


class NamedTopics(AnswerTask):
    """The same names and topics as for MiniLM-L6, about sixty topics; the test uses held-out names."""

    question: ClassVar[str] = "What is the topic of: {}"

    def __init__(self, name: str = "smollm2") -> None:
        base: Any
        base, tokenizer = load_model(name, dtype=fastest_dtype(torch.device("cpu")))
        base.set_attn_implementation("eager")  # fastest for short sequences on CPUs
        records = [self._record(*pair) for pair in self.pairs()]
        test, validation = records[:NUM_TEST], records[NUM_TEST : NUM_TEST + NUM_VALIDATION]
        collator = ImageTextCollator(tokenizer, template="tulu", max_length=512)
        super().__init__(base, collator, records[NUM_TEST + NUM_VALIDATION :], validation, test, probes={})

    def pairs(self) -> list[tuple[str, str]]:
        """Return names with their answers, in a fixed random order."""
        return named_topics()

    def _record(self, name: str, answer: str) -> Record:
        turns = (Turn("user", self.question.format(name)), Turn("assistant", answer.replace("-", " ")))
        return Record(name, (), turns)


class NamedGroups(NamedTopics):
    """The same names with one of eight groups, and the same names held out: a task much like the first."""

    question = "What is the group of: {}"

    def pairs(self) -> list[tuple[str, str]]:
        """Return the names of the first task with their groups."""
        return named_groups()


class NamedHues(NamedTopics):
    """The hue and lightness of named colors: a task unlike the first."""

    question = "Describe the color {} in two words."

    def pairs(self) -> list[tuple[str, str]]:
        """Return colors with lightness and hue."""
        return named_hues()
