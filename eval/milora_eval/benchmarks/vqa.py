"""VQAv2, OK-VQA and VizWiz: answers of ten annotators, with the normaliser and the accuracy of the official scripts.

Follows GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, with its quirks: the look-behind of the
period rule has no effect, this rule stops after 32 periods, and nothing is normalised if all annotators agree. VizWiz'
script normalises the answer but never the references. Protocol llava first applies the M4C normaliser to the answer, as
scripts/convert_vqav2_for_submission.py and convert_vizwiz_for_submission.py do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item, Upload, write_rows
from milora_eval.benchmarks.llava_prompts import SHORT, UNANSWERABLE, picture_item
from milora_eval.data_files import find_all

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
ARTICLES = frozenset(("a", "an", "the"))

# Each word also counts with one apostrophe omitted. The script's Im, Ive, Id've and I'dve are omitted: their capitals
# never match a lower-case text.
_WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _WORDS for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the script has this pair in the wrong order

_PERIOD = re.compile(r"\.(?!\d)")
_COMMA = re.compile(r"\d,\d")
_MARKS = re.compile(f"[{re.escape(PUNCTUATION)}]")
_NUM_PERIODS = 32  # the script passes re.UNICODE (32) as the count


class VQA(Benchmark):
    """The accuracy over the annotators, overall and by answer type; None without annotations."""

    protocols = ("llava", "official")

    def score(self, item: Item, text: str) -> float | None:
        return vqav2_accuracy(self.uploaded(text), item.answers) if item.answers else None

    def uploaded(self, text: str) -> str:
        return m4c_normalise(text) if self.protocol == "llava" else text


class VQAv2(VQA):
    """val2014."""

    name = "vqav2"
    split = "val2014"
    files: tuple[str, ...] = (
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
        "val2014|images|.",
    )
    source = "visualqa.org/download.html and cocodataset.org (COCO_val2014_*.jpg)"
    details = ("question type", "question_type")
    upload = Upload("{name}_{split}_results.json", "question_id", "answer")

    def load(self, data_dir: Path) -> list[Item]:
        questions, *annotations, pictures = find_all(self, data_dir)
        known = {note["question_id"]: note for path in annotations for note in read_json(path)["annotations"]}
        year = "test2015" if self.split.startswith("test") else self.split
        items = []
        for question in read_json(questions)["questions"]:
            note = known.get(question["question_id"], {})
            item = picture_item(
                question["question_id"],
                question["question"] + SHORT,
                pictures / f"COCO_{year}_{question['image_id']:012d}.jpg",
                answers=[entry["answer"] for entry in note.get("answers", ())],
                kind=note.get("answer_type", ""),
                meta={"question_type": note.get("question_type", "")},
            )
            items.append(item)
        return items


class OKVQA(VQAv2):
    """val2014: questions that need outside knowledge."""

    name = "okvqa"
    files = (
        "OpenEnded_mscoco_val2014_questions.json",
        "mscoco_val2014_annotations.json",
        "val2014|images|.",
    )
    source = "okvqa.allenai.org/download.html and cocodataset.org (val2014)"


class VQAv2TestDev(VQAv2):
    """test-dev: writes a file for the server. If the questions of test2015 exist, the others get empty answers."""

    name = "vqav2-testdev"
    split = "test-dev2015"
    files = ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "test2015|images|.")
    folders = ("vqav2",)
    source = "visualqa.org/download.html and cocodataset.org (COCO_test2015_*.jpg)"
    upload = Upload("vqav2_{split}_results.json", "question_id", "answer")
    whole = "v2_OpenEnded_mscoco_test2015_questions.json"

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        (path,) = super().submission(answers, folder, data_dir)
        if (data_dir / self.whole).is_file():
            rows = read_json(path)
            asked = {row["question_id"] for row in rows}
            all_ids = (question["question_id"] for question in read_json(data_dir / self.whole)["questions"])
            write_rows(path, rows + [{"question_id": each, "answer": ""} for each in all_ids if each not in asked])
        return [path]


class VizWiz(VQA):
    """val. As in LLaVA's question file, only the first letter of a question is a capital; the id is the line number."""

    name = "vizwiz"
    split = "val"
    files: tuple[str, ...] = ("val.json|Annotations/val.json", "val|images|.")
    source = "vizwiz.org/tasks-and-datasets/vqa"
    upload = Upload("vizwiz_{split}.json", "image", "answer", "image")

    def recognises(self, question: Any) -> bool:
        return isinstance(question, dict) and str(question.get("image")).startswith("VizWiz_")

    def load(self, data_dir: Path) -> list[Item]:
        questions, pictures = find_all(self, data_dir)
        return [
            picture_item(
                number,
                entry["question"].capitalize() + UNANSWERABLE + SHORT,  # "What is this? and can i eat it?"
                pictures / entry["image"],
                name=entry["image"],
                answers=[answer["answer"] for answer in entry.get("answers", ())],
                kind=entry.get("answer_type", ""),
                meta={"image": entry["image"]},
            )
            for number, entry in enumerate(read_json(questions))
        ]

    def score(self, item: Item, text: str) -> float | None:
        return vizwiz_accuracy(self.uploaded(text), item.answers) if item.answers else None


class VizWizTest(VizWiz):
    """test: writes a file for the server."""

    name = "vizwiz-test"
    split = "test"
    files = ("test.json|Annotations/test.json", "test|images|.")
    folders = ("vizwiz",)


@lru_cache(maxsize=1 << 18)
def normalise(text: str) -> str:
    """Return the normal form of an answer by the official script: punctuation, periods, then words.

    >>> normalise("The t-shirt, two of them")
    't shirt 2 of them'
    """
    return normalise_words(strip_punctuation(text))


def strip_punctuation(text: str) -> str:
    """Delete a mark if it is next to a space anywhere, or if a number has a comma; else replace it by a space."""
    marks = set(_MARKS.findall(text))
    if marks:
        grouped = _COMMA.search(text) is not None
        table = {ord(m): "" if grouped or f"{m} " in text or f" {m}" in text else " " for m in marks}
        text = text.translate(table)
    return _PERIOD.sub("", text, count=_NUM_PERIODS)


def normalise_words(text: str) -> str:
    """Lower-case the text, convert number words to digits, drop articles, and restore apostrophes in contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 18)
def m4c_normalise(text: str) -> str:
    """Return TextVQA's normal form (M4C): like VQA's, but commas, question marks and `'s` are processed first.

    >>> m4c_normalise("Dog's"), m4c_normalise("red,blue")
    ("dog 's", 'redblue')
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_words(strip_punctuation(clean(text)))


def vqav2_accuracy(text: str, references: Sequence[str]) -> float:
    """Return the accuracy of one answer, 0.0 to 1.0; both sides are normalised only if the references differ."""
    text, references = clean(text), [clean(reference) for reference in references]
    if len(set(references)) > 1:
        text, references = normalise(text), [normalise(reference) for reference in references]
    return leave_one_out(text, references)


def vizwiz_accuracy(text: str, references: Sequence[str]) -> float:
    """Return the accuracy of one answer by VizWiz' script, which normalises the answer but never the references."""
    return leave_one_out(normalise(clean(text)), [clean(reference) for reference in references])


def leave_one_out(text: str, references: Sequence[str]) -> float:
    """Return the mean over annotators of min(1, matches among the others / 3)."""
    matches = sum(reference == text for reference in references)
    own, other = min(1.0, (matches - 1) / 3), min(1.0, matches / 3)
    return (matches * own + (len(references) - matches) * other) / len(references) if matches else 0.0
