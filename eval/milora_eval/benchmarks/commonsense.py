"""The eight commonsense sets as LLM-Adapters, DoRA and MiLoRA evaluate them: generate a text, then find its label.

Follows AGI-Edgerunners/LLM-Adapters commonsense_evaluate.py: its Alpaca prompt with the indentation of the source, four
beams, 32 new tokens. The scores are not comparable with lm-evaluation-harness, which ranks likelihoods.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from milora_data.encode.templates import ALPACA_SYSTEM
from milora_data.formats.jsonfile import read_json
from milora_data.records.record import Turn
from milora_eval.benchmark import Benchmark, Item
from milora_eval.data_files import find

_ANSWERS = "answer1|answer2|answer3|answer4|answer5"
LABELS = {
    "boolq": "true|false",
    "piqa": "solution1|solution2",
    "social_i_qa": _ANSWERS,
    "ARC-Challenge": _ANSWERS,
    "ARC-Easy": _ANSWERS,
    "openbookqa": _ANSWERS,
    "hellaswag": "ending1|ending2|ending3|ending4",
    "winogrande": "option1|option2",
}
_INDENT = "\n" + " " * 16
HEAD = f"{ALPACA_SYSTEM} \n"


def alpaca(instruction: str) -> str:
    return f"{HEAD}{_INDENT}### Instruction:{_INDENT}{instruction}\n{_INDENT}### Response:{_INDENT}"


class BoolQ(Benchmark):
    """True or false, without the passage; the base class of the other sets."""

    name = "boolq"
    protocols = ("llm-adapters",)
    max_new_tokens = 32
    num_beams = 4
    form = "raw"
    dataset = "boolq"
    source = "github.com/AGI-Edgerunners/LLM-Adapters (dataset/*/test.json)"
    files: tuple[str, ...] = ("boolq/test.json|dataset/boolq/test.json|test.json",)

    def __init_subclass__(cls) -> None:
        cls.files = (f"{cls.dataset}/test.json|dataset/{cls.dataset}/test.json|test.json",)

    def recognises(self, question: Any) -> bool:
        if not (isinstance(question, dict) and "instruction" in question):
            return False
        label = str(question.get("answer"))
        return commonsense_label(label, self.dataset) == label

    def load(self, data_dir: Path) -> list[Item]:
        entries = read_json(find(self, data_dir, self.files[0]))
        return [
            Item(
                id=str(number),
                turns=(Turn("user", alpaca(entry["instruction"])),),
                answers=(entry["answer"],),
                meta={"question_id": number},
            )
            for number, entry in enumerate(entries)
        ]

    def score(self, item: Item, text: str) -> float:
        answer = text.split("### Response:")[0]  # like the script: the text up to a second response header
        return float(commonsense_label(answer, self.dataset) == item.answers[0])


class PIQA(BoolQ):
    name = dataset = "piqa"


class SIQA(BoolQ):
    name, dataset = "siqa", "social_i_qa"


class HellaSwag(BoolQ):
    name = dataset = "hellaswag"


class WinoGrande(BoolQ):
    name = dataset = "winogrande"


class ARCEasy(BoolQ):
    name, dataset = "arc-e", "ARC-Easy"


class ARCChallenge(BoolQ):
    name, dataset = "arc-c", "ARC-Challenge"


class OBQA(BoolQ):
    name, dataset = "obqa", "openbookqa"


def commonsense_label(text: str, dataset: str) -> str:
    """Return the first label in an answer, also inside other words; "" without a match.

    Raises KeyError for an unknown data set.

    >>> commonsense_label("the correct answer is untrue", "boolq")
    'true'
    """
    match = re.search(LABELS[dataset], text)
    return match.group() if match else ""
