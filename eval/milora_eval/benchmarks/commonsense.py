"""The eight commonsense sets as LLM-Adapters, DoRA and MiLoRA evaluate them: generate a text, then find its label.

Follows AGI-Edgerunners/LLM-Adapters commonsense_evaluate.py: its Alpaca prompt with the indentation of the source, four
beams, 32 new tokens. The scores are not comparable with lm-evaluation-harness, which ranks likelihoods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_data.records.record import Turn
from milora_eval.benchmark import Benchmark, Item
from milora_eval.data_files import find
from milora_eval.rules.commonsense import commonsense_label

_INDENT = "\n" + " " * 16
HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"


def alpaca(instruction: str) -> str:
    """Return the prompt of one instruction, byte for byte the same as the script's f-string."""
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
        """Set the file of each set: test.json in a folder with its name."""
        cls.files = (f"{cls.dataset}/test.json|dataset/{cls.dataset}/test.json|test.json",)

    def recognises(self, question: Any) -> bool:
        """Return whether the answer to an instruction is a label of this set."""
        if not (isinstance(question, dict) and "instruction" in question):
            return False
        label = str(question.get("answer"))
        return commonsense_label(label, self.dataset) == label

    def load(self, data_dir: Path) -> list[Item]:
        """Read test.json: [{instruction, input, output, answer}]."""
        entries = read_json(find(self, data_dir, self.files[0]))
        return [
            Item(
                id=str(number),
                turns=(Turn("user", alpaca(entry["instruction"])),),
                answers=(entry["answer"],),
                group=str(number),
                meta={"question_id": number},
            )
            for number, entry in enumerate(entries)
        ]

    def score(self, item: Item, text: str) -> float:
        """Return 1.0 if the first label in the answer is right."""
        answer = text.split("### Response:")[0]  # like the script: the text up to a second response header
        return float(commonsense_label(answer, self.dataset) == item.answers[0])


class PIQA(BoolQ):
    """Physical commonsense."""

    name = dataset = "piqa"


class SIQA(BoolQ):
    """Social situations."""

    name, dataset = "siqa", "social_i_qa"


class HellaSwag(BoolQ):
    """Endings of a description."""

    name = dataset = "hellaswag"


class WinoGrande(BoolQ):
    """The referent of a pronoun."""

    name = dataset = "winogrande"


class ARCEasy(BoolQ):
    """School science, easy."""

    name, dataset = "arc-e", "ARC-Easy"


class ARCChallenge(BoolQ):
    """School science, hard."""

    name, dataset = "arc-c", "ARC-Challenge"


class OBQA(BoolQ):
    """Elementary science that needs a fact."""

    name, dataset = "obqa", "openbookqa"
