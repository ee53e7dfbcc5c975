"""GSM8K and MATH as MiLoRA evaluates them: the answer follows "The answer is: ".

Follows sufenlp/MiLoRA inference/ (MetaMath's scripts): the Alpaca prompt with "Let's think step by step." and greedy
decoding, which stops before another task begins. Files: MetaMath's GSM8K_test.jsonl and MATH_test.jsonl, or the files
of the original data sets.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from milora_data.encode.templates import ALPACA_SYSTEM
from milora_data.records.record import Turn
from milora_eval.benchmark import Benchmark, Item
from milora_eval.benchmarks.math_answers import gsm8k_correct, last_boxed, math_correct
from milora_eval.data_files import find, json_values

PROMPT = ALPACA_SYSTEM + "\n\n### Instruction:\n{}\n\n### Response: Let's think step by step."
_STOP = re.compile("Instruction|Response")  # as in MiLoRA's scripts; MetaMath's scripts have more stop words


class GSM8K(Benchmark):
    name = "gsm8k"
    protocols = ("milora",)
    max_new_tokens = 1024
    form = "raw"
    files: tuple[str, ...] = ("GSM8K_test.jsonl|test.jsonl",)
    source = "github.com/meta-math/MetaMath (data/test) or github.com/openai/grade-school-math"
    questions: tuple[str, ...] = ("query", "question")
    solutions: tuple[str, ...] = ("response", "answer")
    mark = "####"

    def recognises(self, question: Any) -> bool:
        return isinstance(question, dict) and any(self.mark in str(question.get(key)) for key in self.solutions)

    def load(self, data_dir: Path) -> list[Item]:
        path = find(self, data_dir, self.files[0])
        return [self._item(number, entry) for number, entry in enumerate(json_values(path), start=1)]

    def score(self, item: Item, text: str) -> float:
        return float(gsm8k_correct(stopped(text), int(item.answers[0])))

    def truth(self, solution: str) -> str:
        return str(int(float(solution.split("#### ")[-1].replace(",", ""))))

    def _item(self, number: int, entry: dict[str, Any]) -> Item:
        question = next((entry[key] for key in self.questions if key in entry), None)
        solution = next((entry[key] for key in self.solutions if key in entry), None)
        if question is None or solution is None:
            message = f"question {number}: expected {self.questions[0]} and {self.solutions[0]}, got {list(entry)}"
            raise ValueError(message)
        return Item(
            id=str(number),
            turns=(Turn("user", PROMPT.format(question)),),
            answers=(self.truth(solution),),
            kind=str(entry.get("type", "")),
            meta={"question_id": number},
        )


class MATH(GSM8K):
    """Competition mathematics; also by subject if the file names the subjects."""

    name = "math"
    max_new_tokens = 2048
    files = ("MATH_test.jsonl|test.jsonl",)
    source = "github.com/meta-math/MetaMath (data/test)"
    questions = ("instruction", "query", "problem")
    solutions = ("output", "response", "solution")
    mark = "\\boxed"

    def score(self, item: Item, text: str) -> float:
        return float(math_correct(stopped(text), item.answers[0]))

    def truth(self, solution: str) -> str:
        return last_boxed(solution) or ""


def stopped(text: str) -> str:
    return _STOP.split(text, maxsplit=1)[0]
