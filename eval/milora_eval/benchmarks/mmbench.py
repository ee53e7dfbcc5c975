"""MMBench, English and Chinese: a question counts as right if the model is right for every rotation of its options.

Prompts follow llava/eval/model_vqa_mmbench.py. The chosen option is parsed with VLMEvalKit's exact matching, without a
judge: vlmeval/utils/matching_util.py, whose switch VERBOSE is off, and vlmeval/dataset/utils/multiple_choice.py.
The submission follows scripts/convert_mmbench_for_submission.py. The legacy dev file has one row per rotation (index +
1,000,000 each), which LLaVA asks once each. Without them the rotations are generated, as with --all-rounds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from milora_eval.benchmark import Answer, Benchmark, Item, Metric, grouped, means
from milora_eval.benchmarks.llava_prompts import LETTER, LETTER_CN, lettered, picture_item
from milora_eval.data_files import find, read_table, table_rows, write_excel

ROTATION = 1_000_000
DROPPED = ["hint", "category", "source", "image", "comment", "l2-category"]

Letter = str | Literal[False]

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_ANSWER = "Failed to obtain answer via API"
_VERBOSE = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


class MMBench(Benchmark):
    """dev, English: circular accuracy, overall and by category, and the accuracy on the first rotation."""

    name = "mmbench"
    version = "20230712"
    split = "dev"
    max_new_tokens = 1024
    files: tuple[str, ...] = ("mmbench_dev_20230712.tsv|MMBench_DEV_EN_legacy.tsv|MMBench_DEV_EN.tsv",)
    source = "download.openmmlab.com/mmclassic/datasets/mmbench"
    metric = "circular accuracy"
    suffix = LETTER

    def load(self, data_dir: Path) -> list[Item]:
        rows = table_rows(self, data_dir)
        num_rows = Counter(int(row["index"]) % ROTATION for row in rows)
        rotated = len(num_rows) < len(rows)
        items = []
        for row in rows:
            turns = 1 if rotated else max(1, len(_options(row)))
            count = num_rows[int(row["index"]) % ROTATION] if rotated else turns
            items += [self._item(row, turn, count) for turn in range(turns)]
        return items

    def score(self, item: Item, text: str) -> float | None:
        return float(mmbench_option(text, item.meta["options"]) == item.answers[0]) if item.answers else None

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        scored = [answer for answer in answers if answer.value is not None]
        if not scored:
            return []
        circular = means(self.units(scored), self.metric)
        if not any(map(_is_complete, _questions(scored))):
            circular[0] = replace(circular[0], note="no question has all of its rotations: --limit is too small")
        first = means((a for a in scored if a.item.meta["index"] < ROTATION), "first rotation")
        return [circular[0], *(replace(metric, mean_of=None) for metric in first[:1]), *circular[1:]]

    def units(self, answers: Sequence[Answer]) -> list[Answer]:
        """Return one answer per question, right if all rotations are right; skip questions that a limit has cut."""
        questions = _questions(answers)
        complete = [rotations for rotations in questions if _is_complete(rotations)]
        return [min(rotations, key=lambda answer: answer.worth) for rotations in complete or questions]

    def llava_question(self, item: Item) -> dict[str, Any]:
        """Return the prompt as in model_vqa_mmbench.py, without the request for a letter."""
        return super().llava_question(item) | {"text": item.plain_text.removesuffix(self.suffix)}

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write the table for the server: the rows of the file, with `prediction` as the seventh column."""
        texts = {a.item.meta["index"]: a.text for a in answers}
        table = read_table(find(self, data_dir, self.files[0])).drop(columns=DROPPED, errors="ignore")
        indices = [int(index) for index in table["index"]]
        table["index"] = indices
        table.insert(min(6, len(table.columns)), "prediction", [texts.get(index) for index in indices])
        return [write_excel(folder / f"{self.name}_{self.split}.xlsx", table)]

    def item(self, number: int, row: dict[str, Any]) -> Item:
        return self._item(row, 0, 1)

    def _item(self, row: dict[str, Any], turn: int, rotations: int) -> Item:
        options = _options(row)
        turned = options[turn:] + options[:turn]
        question = f"{row['hint']}\n{row['question']}" if _is_there(row.get("hint")) else row["question"]
        index = int(row["index"]) + turn * ROTATION
        answer = row.get("answer", "")
        if turn and answer:
            answer = "ABCD"[("ABCD".index(answer) - turn) % len(options)]
        return picture_item(
            index,
            question + lettered(turned) + self.suffix,
            row["picture"],
            answers=[answer] if answer else [],
            kind=row.get("l2-category", row.get("category", "")),
            meta={
                "index": index,
                "round": turn,
                "rotations": rotations,
                "options": dict(zip("ABCD", turned, strict=False)),
                "category": row.get("category", ""),
            },
        )


class MMBenchCN(MMBench):
    """dev, Chinese."""

    name = "mmbench-cn"
    version = "20231003"
    files = ("mmbench_dev_cn_20231003.tsv|MMBench_DEV_CN_legacy.tsv|MMBench_DEV_CN.tsv",)
    folders = ("mmbench_cn", "mmbench")
    suffix = LETTER_CN


class MMBenchTest(MMBench):
    """test, English: writes a file for the server, and computes a score if the table has answers."""

    name = "mmbench-test"
    split = "test"
    files = ("mmbench_test_20230712.tsv|MMBench_TEST_EN_legacy.tsv|MMBench_TEST_EN.tsv",)
    folders = ("mmbench",)


def _questions(answers: Iterable[Answer]) -> list[list[Answer]]:
    return list(grouped(answers, lambda answer: answer.item.meta["index"] % ROTATION).values())


def _is_complete(rotations: Sequence[Answer]) -> bool:
    return len(rotations) >= rotations[0].item.meta["rotations"]


def _options(row: Mapping[str, str]) -> list[str]:
    """Return the options up to the first missing one, like LLaVA's get_options."""
    options: list[str] = []
    for letter in "ABCD":
        if not _is_there(row.get(letter)):
            break
        options.append(row[letter])
    return options


def _is_there(text: str | None) -> bool:
    return text is not None and text.lower() not in ("nan", "none")


def mmbench_option(text: str, choices: Mapping[str, str]) -> Letter:
    """Return the letter of an answer by VLMEvalKit's rules, "Z" for a refusal, False if it is not clear.

    >>> mmbench_option("The answer is (B).", {"A": "red", "B": "green"})
    'B'
    """
    return option_letter(text, choices) or _option_by_text(text, choices)


def option_letter(text: str, letters: Iterable[str]) -> Letter:
    """Return the letter named in an answer: alone among its last words, or after "answer is"."""
    letters = list(letters)
    if NO_ANSWER in text:
        return False
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = text.translate(_BLANKED).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    found = _VERBOSE.search(text)
    return found.group(1).upper() if found is not None and found.group(1).upper() in letters else False


def _option_by_text(text: str, choices: Mapping[str, str]) -> Letter:
    """Return the only option whose text is in the answer; one more than twice as long as all options has none."""
    text = text.lower()
    if len(text) > 2 * sum(len(str(option)) for option in choices.values()):
        return False
    named = [letter for letter, option in choices.items() if str(option).lower() in text]
    return named[0] if len(named) == 1 else False
