"""AI2D, ChartQA, CUB-200, DocVQA, InfographicVQA, MMStar, PathVQA and RealWorldQA: a table, a prompt, a rule.

The files are tables of the hub or of VLMEvalKit (`.parquet`, `.tsv`), or the official ones. Prompts and rules follow:

AI2D, RealWorldQA   EvolvingLMMs-Lab/lmms-eval at 75571cf (tasks/ai2d, tasks/realworldqa, _task_utils/mcq_extract.py)
MMStar              MMStar-Benchmark/MMStar (eval/vlmeval/evaluate/mmstar.py); its prompt lmms-eval's tasks/mmstar
CUB-200, PathVQA    jessemelpolio/LMM_CL, the code of arXiv:2510.08564 (lmms-eval/lmms_eval/tasks); PathVQA's own script
ChartQA, DocVQA     LLaVA's prompt; pix2struct's and the RRC script's rule

Columns of VLMEvalKit's tables (index, A, B, ...) are asked as in its prompt for LLaVA, which is the same.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item, Metric, Upload, means, means_of_types
from milora_eval.benchmarks.llava_prompts import LETTER, LETTERS, SHORT, picture_item
from milora_eval.benchmarks.mmbench import mmbench_option
from milora_eval.benchmarks.short_answers import anls, chartqa_correct, pathvqa_exact_match, pathvqa_f1
from milora_eval.data_files import find_all, is_table, table_rows

DataRow = dict[str, Any]
HUB_TEST = "data/test-*.parquet|test-*.parquet"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# The forms in which `mcq_letter` finds a letter, and how much each counts.
_MARKED = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_START, _END, _PHRASE, _ANYWHERE = 10, 9, 7, 0
_PHRASES = (
    *(f"{what} is" for what in ("the answer", "answer", "the correct answer", "correct answer", "the best answer")),
    *(f"{what} is" for what in ("best answer", "the correct option", "correct option", "the best option")),
    *(f"{what} is" for what in ("best option", "the choice", "choice", "the correct choice", "correct choice")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is", "옵션", "정답은", "답은", "답:"),
    *("答案是", "答案为", "选", "答えは"),
)


class PlainSet(Benchmark):
    """A set of rows: `item` makes the question of a row, and `rows` reads other files than a table as rows."""

    def load(self, data_dir: Path) -> list[Item]:
        paths = find_all(self, data_dir)
        rows = table_rows(self, data_dir) if is_table(paths[0]) else self.rows(*paths)
        return [self.item(number, row) for number, row in enumerate(rows)]

    def rows(self, *paths: Path) -> Iterable[DataRow]:
        raise NotImplementedError  # all files are tables

    def item(self, number: int, row: DataRow) -> Item:
        raise NotImplementedError


class AI2D(PlainSet):
    """Diagrams of school books. Protocol vlmevalkit reads the option as VLMEvalKit does without a judge."""

    name = "ai2d"
    protocols = ("lmms-eval", "vlmevalkit")
    max_new_tokens = 16
    files = (f"{HUB_TEST}|AI2D_TEST.tsv",)
    source = "huggingface.co/datasets/lmms-lab/ai2d, or VLMEvalKit's AI2D_TEST.tsv (opencompass.openxlab.space)"

    def recognises(self, question: Any) -> bool:
        return bool(_choices(question)) and "l2_category" not in question

    def item(self, number: int, row: DataRow) -> Item:
        choices = _choices(row)  # the hub counts them from 0, VLMEvalKit names their letter
        answer = LETTERS[int(row["answer"])] if "options" in row else row["answer"]
        text = _asked_for_letter(row["question"], choices)
        meta = {"options": choices}
        return picture_item(row.get("index", number), text, row["picture"], answers=[answer], meta=meta)

    def score(self, item: Item, text: str) -> float:
        if self.protocol == "vlmevalkit":
            return float(mmbench_option(text, item.meta["options"]) == item.answers[0])
        return float(ai2d_correct(text, item.answers[0]))


class RealWorldQA(PlainSet):
    """Photographs, most of them from cars. The question itself asks for a letter, a word or a number."""

    name = "realworldqa"
    protocols = ("lmms-eval",)
    max_new_tokens = 16
    files = (f"{HUB_TEST}|RealWorldQA.tsv",)
    source = "huggingface.co/datasets/xai-org/RealworldQA, or VLMEvalKit's RealWorldQA.tsv (opencompass.openxlab.space)"

    def recognises(self, question: Any) -> bool:
        return "Please answer directly" in question.get("question", "") or "A" in question

    def item(self, number: int, row: DataRow) -> Item:
        text, choices, answer = row["question"].strip(), _choices(row), row["answer"].strip()
        text = _asked_for_letter(text, choices) if choices else text
        kind = "letter" if answer in tuple("ABCD") else "open"
        return picture_item(row.get("index", number), text, row["picture"], answers=[answer], kind=kind)

    def score(self, item: Item, text: str) -> float:
        return float(realworldqa_correct(text, item.answers[0]))


class MMStar(PlainSet):
    """1,500 questions that need the picture, by core capability. Protocol lmms-eval finds the letter anywhere."""

    name = "mmstar"
    protocols = ("official", "lmms-eval")
    split = "val"
    max_new_tokens = 32
    files = ("mmstar.parquet|MMStar.tsv",)
    source = "huggingface.co/datasets/Lin-Chen/MMStar"
    details = ("axis", "l2_category")

    def recognises(self, question: Any) -> bool:
        return {"category", "l2_category"} <= question.keys()

    def item(self, number: int, row: DataRow) -> Item:
        if choices := _choices(row):
            text = _asked_for_letter(row["question"], choices)
        else:  # the question has its options
            text = row["question"].strip().replace(" Please answer yes or no.", "") + LETTER.removesuffix(".")
        kind, meta = row["category"], {"l2_category": row["l2_category"]}
        answers = [row["answer"].strip()]
        return picture_item(row["index"], text, row["picture"], answers=answers, kind=kind, meta=meta)

    def score(self, item: Item, text: str) -> float:
        if self.protocol == "lmms-eval":
            return float(mcq_letter(text, "ABCD") == item.answers[0].upper())
        return float(mmstar_correct(text, item.answers[0]))


class CUB200(PlainSet):
    """Which of 26 species is the bird? The official evaluation also prints its settings into the prompt, by mistake."""

    name = "cub200"
    protocols = ("lmm-cl",)
    max_new_tokens = 16
    files = ("data/train-*.parquet|train-*.parquet",)
    source = "huggingface.co/datasets/Jessemel/cub200-test"

    def recognises(self, question: Any) -> bool:
        return LETTER.strip() in question.get("question", "")

    def item(self, number: int, row: DataRow) -> Item:
        text = row["question"].replace("\n<image>", "").replace("<image>", "")
        return picture_item(number, text, row["picture"], answers=[row["answer"]])

    def score(self, item: Item, text: str) -> float:
        return float(cub200_correct(text, item.answers[0]))


class DocVQA(PlainSet):
    """Average normalised Levenshtein similarity (ANLS) on the val split of task 1."""

    name = "docvqa"
    split = "val"
    files: tuple[str, ...] = (
        "val_v1.0_withQT.json|val_v1.0.json|val/val_v1.0.json|DocVQA/validation-*.parquet|DocVQA_VAL.tsv",
        "documents|val/documents|DocVQA/validation-*.parquet|DocVQA_VAL.tsv",
    )
    source = "rrc.cvc.uab.es, Document Visual Question Answering, task 1, or huggingface.co/datasets/lmms-lab/DocVQA"
    metric = "ANLS"
    upload = Upload("{name}_{split}.json", "questionId", "answer")
    picture_key = "image"

    def rows(self, *paths: Path) -> Iterable[DataRow]:
        for entry in read_json(paths[0])["data"]:
            answers = entry.get("answers", ())
            yield entry | {"answers": answers, "picture": paths[1] / Path(entry[self.picture_key]).name}

    def item(self, number: int, row: DataRow) -> Item:
        answers = ast.literal_eval(row["answer"]) if "answer" in row else row["answers"] or ()  # VLMEvalKit's is a text
        name = int(row["index"] if "index" in row else row["questionId"])
        return picture_item(name, row["question"] + SHORT, row["picture"], answers=answers)

    def score(self, item: Item, text: str) -> float | None:
        return anls(text, item.answers) if item.answers else None


class InfoVQA(DocVQA):
    """The val split of task 3."""

    name = "infovqa"
    files = (
        "infographicsVQA_val_v1.0_withQT.json|infographicsVQA_val_v1.0.json|InfographicVQA/validation-*.parquet|InfoVQA_VAL.tsv",
        "infographicsvqa_images|infographicVQA_val_v1.0_images|images|InfographicVQA/validation-*.parquet|InfoVQA_VAL.tsv",
    )
    source = "rrc.cvc.uab.es, Document Visual Question Answering, task 3, or huggingface.co/datasets/lmms-lab/DocVQA"
    picture_key = "image_local_name"


class ChartQA(PlainSet):
    """Relaxed accuracy (5 % tolerance for numbers) on the human and the augmented half, and their mean."""

    name = "chartqa"
    halves = ("human", "augmented")
    files = (
        *(
            f"test/test_{half}.json|test_{half}.json|ChartQA Dataset/test/test_{half}.json|{HUB_TEST}|ChartQA_TEST.tsv"
            for half in halves
        ),
        f"test/png|png|ChartQA Dataset/test/png|{HUB_TEST}|ChartQA_TEST.tsv",
    )
    source = "github.com/vis-nlp/ChartQA, or huggingface.co/datasets/lmms-lab/ChartQA"
    metric = "mean of halves"

    def recognises(self, question: Any) -> bool:
        return isinstance(question, dict) and any(key in question for key in ("imgname", "type", "split"))

    def rows(self, *paths: Path) -> Iterable[DataRow]:
        for half, path in zip(self.halves, paths, strict=False):
            for number, entry in enumerate(read_json(path)):
                picture = paths[2] / entry["imgname"]
                about = {"type": half, "number": number, "picture": picture}
                yield about | {"question": entry["query"], "answer": entry["label"]}

    def item(self, number: int, row: DataRow) -> Item:
        half = "human" if "human" in (row["type"] if "type" in row else row["split"]) else "augmented"
        name, text = f"{half}/{row.get('number', number)}", row["question"] + SHORT
        return picture_item(name, text, row["picture"], answers=[row["answer"]], kind=half)

    def score(self, item: Item, text: str) -> float:
        return float(chartqa_correct(text, item.answers[0]))

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        return means_of_types(answers, self.metric)


class PathVQA(PlainSet):
    """Pathology: exact match of the words, overall and by type (yes/no if the reference is), then their F1."""

    name = "pathvqa"
    max_new_tokens = 64
    files = (HUB_TEST,)
    source = "huggingface.co/datasets/flaviagiammarino/path-vqa"
    metric = "exact match"
    before = "Look at the medical image and answer the following question: "
    after = (
        "\nFor questions that can be answered with a yes or no, just answer yes or no. "
        "Otherwise, provide an answer in the medical domain."
    )

    def recognises(self, question: Any) -> bool:
        return question.keys() == {"question", "answer"} and "directly" not in question["question"]

    def item(self, number: int, row: DataRow) -> Item:
        kind = "yes/no" if row["answer"].strip().lower() in ("yes", "no") else "open"
        text = self.before + row["question"] + self.after
        return picture_item(number, text, row["picture"], answers=[row["answer"]], kind=kind)

    def score(self, item: Item, text: str) -> float:
        return pathvqa_exact_match(text.strip(), item.answers[0])

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        answers = list(answers)
        values = (replace(each, value=pathvqa_f1(each.text.strip(), each.item.answers[0])) for each in answers)
        return [*means(answers, self.metric), *(replace(each, mean_of=None) for each in means(values, "F1")[:1])]


def _choices(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the options of a row by letter: its list `options`, or as in VLMEvalKit's tables its columns A, B, ..."""
    if "options" in row:
        return {LETTERS[index]: str(option) for index, option in enumerate(row["options"])}
    return {letter: row[letter] for letter in LETTERS if letter in row}


def _asked_for_letter(question: str, choices: Mapping[str, str]) -> str:
    return question + "".join(f"\n{letter}. {option}" for letter, option in choices.items()) + LETTER


def ai2d_correct(text: str, letter: str) -> bool:
    """Return whether an answer starts with the letter and a period, or is the letter alone.

    Case and punctuation do not count in a lone letter: "(b)" is right. "B) red" and "Option B" are wrong.

    >>> ai2d_correct("B. red", "B"), ai2d_correct("B red", "B")
    (True, False)
    """
    found = re.match(r"\s*([A-Z])\.", text)
    return (found.group(1) if found else text).strip().translate(_NO_PUNCTUATION).lower() == letter.lower()


def mmstar_correct(text: str, letter: str) -> bool:
    """Return whether an answer starts with the letter, with "(" or "option " or "the answer is " before it.

    What follows does not count: "Because of the sun" is B.

    >>> mmstar_correct("The answer is B", "B"), mmstar_correct("Answer: B", "B")
    (True, False)
    """
    text = text.lower().strip().replace("\n", " ")
    starts = ("", "(", "option ", "the answer is ")
    return any(text.startswith(start + letter.lower().strip()) for start in starts)


def cub200_correct(text: str, letter: str) -> bool:
    """Return whether the first letter that stands alone in an answer is the right one, else its first letter.

    "I choose B" names the letter I, and "A bird: B" the letter A.

    >>> cub200_correct("It is (b)", "B"), cub200_correct("I choose B", "B")
    (True, False)
    """
    text = text.strip()
    found = re.search(r"\b([A-Za-z])[.)]?\b", text)
    named = found.group(1) if found else text[:1] if text[:1].isalpha() else text
    return named.lower() == letter.lower()


def realworldqa_correct(text: str, answer: str) -> bool:
    """Return whether the letter of an answer (`mcq_letter`) is A to D, else whether its text equals the reference.

    >>> realworldqa_correct("The answer is B.", "B"), realworldqa_correct("Three.", "three")
    (True, True)
    """
    answer = answer.strip()
    if answer.upper() in ("A", "B", "C", "D"):
        return mcq_letter(text, "ABCD") == answer.upper()
    return text.lower().strip().rstrip(".") == answer.lower()


def mcq_letter(text: str, letters: Sequence[str]) -> str:
    """Return the capital letter that an answer names in the strongest form, the last one of that form; "" without one.

    After a phrase such as "the answer is", any of the letters counts, also inside a word.

    >>> mcq_letter("The answer is B.", "ABCD"), mcq_letter("The answer is B because A is wrong.", "ABCD")
    ('B', 'A')
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    found: list[tuple[int, int, str]] = []  # strength, position, letter
    for form, strength in _MARKED:
        found += [(strength, text.rfind(form.format(each)), each) for each in letters if form.format(each) in text]
    for phrase in _PHRASES:
        start = text.lower().find(phrase)
        if start >= 0:
            positions = {each: text.find(each, start + len(phrase)) for each in letters}
            found += [(_PHRASE, position, each) for each, position in positions.items() if position >= 0]
    found += [(_START, 0, each) for each in letters if bare.startswith(each) and not bare[1:2].isalpha()]
    found += [(_END, len(text), each) for each in letters if bare.endswith(each) and not bare[-2:-1].isalpha()]
    found = found or [(_ANYWHERE, text.rfind(each), each) for each in letters if each in text]
    return max(found, key=lambda each: each[:2])[2] if found else ""
