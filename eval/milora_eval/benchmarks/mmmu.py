"""MMMU, validation: college-level questions of 30 subjects, multiple-choice and open.

Prompts follow the benchmark's mmmu/configs/llava1.5.yaml and run_llava.py, which show only the first picture (their
check for options that are pictures iterates over the letters of a text and finds none). An empty line inside quotes of
the yaml is one newline, so no empty line separates a question from its options. Scores follow mmmu/utils/eval_utils.py,
with one difference: an answer without an option gets a random option, as in the script, but the choice depends only on
the item, not on the order of the items.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_eval.benchmark import Answer, Benchmark, Item, Metric, means
from milora_eval.benchmarks.llava_prompts import LETTER, SHORT, picture_item
from milora_eval.data_files import find, unpack_picture
from milora_vl.common.atomic_write import write_json

LETTERS = "ABCDEFGHIJ"
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# As in the script, plus (?<!\d): no match starts inside a run of digits, and trying to takes quadratic time.
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


class MMMU(Benchmark):
    """Accuracy over all questions (micro), and per subject as details."""

    name = "mmmu"
    split = "validation"
    files = ("Accounting/validation-00000-of-00001.parquet|validation-00000-of-00001.parquet",)
    source = "huggingface.co/datasets/MMMU/MMMU (a folder of parquet files per subject)"

    def load(self, data_dir: Path) -> list[Item]:
        import pyarrow.parquet as parquet

        files = sorted([*data_dir.glob("*/validation*.parquet"), *data_dir.glob("validation*.parquet")])
        if not files:
            find(self, data_dir, self.files[0])
        return [_item(row) for file in files for row in parquet.read_table(file).to_pylist()]

    def score(self, item: Item, text: str) -> float:
        if item.meta["options"]:
            return float(mmmu_option(text, item.meta["options"], seed=item.id) == item.answers[0])
        return float(mmmu_open_correct(text, item.answers))

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        return means(answers, self.metric, detail=True)

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write {id: answer} for main_eval_only.py: letters for multiple choice, text for open questions."""
        rows = {
            a.item.id: mmmu_option(a.text, a.item.meta["options"], seed=a.item.id) if a.item.meta["options"] else a.text
            for a in answers
        }
        return [write_json(folder / "mmmu_validation.json", rows)]


def _item(row: dict[str, Any]) -> Item:
    options = ast.literal_eval(row["options"]) if isinstance(row["options"], str) else list(row["options"] or ())
    is_choice = row["question_type"] == "multiple-choice"
    lines = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    text = f"{row['question']}\n{lines}{LETTER}" if is_choice else f"{row['question']}{SHORT}"
    truth = row["answer"]
    if not is_choice and isinstance(truth, str) and truth.startswith("["):
        truth = ast.literal_eval(truth)
    return picture_item(
        row["id"],
        text,
        unpack_picture(row["image_1"]["bytes"], row["id"]),
        answers=truth if isinstance(truth, list) else [truth],
        kind=row["id"].removeprefix("validation_").rpartition("_")[0],
        meta={"options": dict(zip(LETTERS, options, strict=False)) if is_choice else {}},
    )


def mmmu_option(text: str, options: Mapping[str, str], *, seed: str = "") -> str:
    """Return the letter of an answer: "(B)", else a lone B, else an option's text in a long answer, else a random one.

    The last option in the text counts. `options` maps letters to texts; `seed` is the item's id.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for around in ("({})", " {} "):
        found = {letter: text.rfind(around.format(letter)) for letter in options if around.format(letter) in text}
        if found:
            return _last(found)
    if len(text.split()) > 5:
        lowered = text.lower()
        found = {
            letter: lowered.rfind(option.lower()) for letter, option in options.items() if option.lower() in lowered
        }
        if found:
            return _last(found)
    return random.Random(f"42 {seed}").choice(list(options))


def mmmu_open_correct(text: str, references: str | Sequence[str]) -> bool:
    """Return whether an open answer is right: a number in it equals a reference, or a part of it contains one."""
    golds = [references] if isinstance(references, str) else references
    right = [form for gold in golds for form in normal_forms(gold)]
    for part in open_parts(text):
        if isinstance(part, str):
            if any(isinstance(form, str) and form in part for form in right):
                return True
        elif part in right:
            return True
    return False


def open_parts(text: str) -> list[str | float]:
    """Return the normalised key phrases of an open answer and all numbers in them."""
    phrases = key_phrases(text)
    numbers = [number for phrase in phrases for pattern in NUMBERS for number in re.findall(pattern, phrase)]
    return list(dict.fromkeys(form for part in (*phrases, *numbers) for form in normal_forms(part)))


def key_phrases(text: str) -> list[str]:
    """Return per line the shortest tail after an indicator ("so", "is", ...; in the last also "="), else the text."""
    text = text.strip().strip(".").lower()
    # The look-ahead for a capital never matches, because the text is lower-case: only newlines split.
    sentences = re.split(r"\.\s(?=[A-Z])|\n", text)
    found = []
    for index, sentence in enumerate(sentences):
        indicators = (*INDICATORS, "=") if index == len(sentences) - 1 else INDICATORS
        tails = [sentence.split(indicator)[-1].strip() for indicator in indicators if indicator in sentence]
        shortest = _shortest(tails)
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return found or [text]


def normal_forms(text: str) -> list[str | float]:
    """Return a number rounded to two decimals, else the lower-case text; a letter gets a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _shortest(tails: Sequence[str]) -> str:
    """Return the first shortest tail; as in the script, the next tail replaces an empty one."""
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best


def _last(positions: Mapping[str, int]) -> str:
    return max(positions, key=lambda letter: positions[letter])
