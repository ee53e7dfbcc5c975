"""TextVQA, val 0.5.1, with and without the OCR tokens that LLaVA adds to the prompt (they gain about ten points).

Scores follow the M4C rule (llava/eval/m4c_evaluator.py). LLaVA's question file uses the picture as the question_id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Benchmark, Item, Upload
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.benchmarks.vqa import leave_one_out, m4c_normalise
from milora_eval.data_files import find, is_table, json_values, table_rows

LLAVA_FILE = "llava_textvqa_val_v051_ocr.jsonl"
TABLE = "data/validation-*.parquet|validation-*.parquet"


class TextVQA(Benchmark):
    """With OCR tokens: verbatim from LLaVA's question file if it exists, else Rosetta's."""

    name = "textvqa"
    version = "0.5.1"
    split = "val"
    files: tuple[str, ...] = (
        f"TextVQA_0.5.1_val.json|{TABLE}",
        f"train_images|train_val_images/train_images|{TABLE}",
        f"{LLAVA_FILE}|TextVQA_Rosetta_OCR_v0.2_val.json|{TABLE}",
    )
    source = "textvqa.org/dataset, or huggingface.co/datasets/lmms-lab/textvqa"
    upload = Upload("textvqa_val.json", "question_id", "answer", "server_id")  # of EvalAI

    def load(self, data_dir: Path) -> list[Item]:
        path = find(self, data_dir, self.files[0])
        if is_table(path):
            entries = table_rows(self, data_dir)
        else:
            pictures = find(self, data_dir, self.files[1])
            data = read_json(path)["data"]
            entries = [entry | {"picture": pictures / f"{entry['image_id']}.jpg"} for entry in data]
        texts = self._texts(data_dir, entries)
        odd = next((entry for entry in entries if len(entry.get("answers", range(10))) != 10), None)
        if odd is not None:
            raise ValueError(f"question {odd['question_id']} has {len(odd['answers'])} answers, expected ten")
        return [
            picture_item(
                entry["image_id"],
                text,
                entry["picture"],
                name=str(entry["question_id"]),
                answers=entry.get("answers", ()),
                meta={"server_id": entry["question_id"]},
            )
            for entry, text in zip(entries, texts, strict=True)
        ]

    def score(self, item: Item, text: str) -> float | None:
        return textvqa_accuracy(text, item.answers) if item.answers else None

    def _texts(self, data_dir: Path, entries: list[dict[str, Any]]) -> list[str]:
        path = find(self, data_dir, self.files[2])
        if path.name == LLAVA_FILE:
            known = {(line["question_id"], question_of(line["text"])): line["text"] for line in json_values(path)}
            return [known[entry["image_id"], entry["question"].lower()] for entry in entries]
        if is_table(path):
            return [_with_tokens(entry["question"], entry["ocr_tokens"]) for entry in entries]
        tokens = {entry["image_id"]: entry["ocr_tokens"] for entry in read_json(path)["data"]}
        return [_with_tokens(entry["question"], tokens.get(entry["image_id"], ())) for entry in entries]


class TextVQAWithoutOCR(TextVQA):
    """The question alone."""

    name = "textvqa-no-ocr"
    files = TextVQA.files[:2]
    folders = ("textvqa",)

    def _texts(self, data_dir: Path, entries: list[dict[str, Any]]) -> list[str]:
        return [entry["question"] + SHORT for entry in entries]


def _with_tokens(question: str, tokens: list[str]) -> str:
    # A newline in a token would make a prompt of four lines, which LLaVA's scorer cannot parse.
    listed = ", ".join(token.replace("\n", " ") for token in tokens)
    return f"{question}\nReference OCR token: {listed}" + SHORT


def textvqa_accuracy(text: str, references: Sequence[str]) -> float:
    """Return the accuracy of one answer against ten references. Raises ValueError for another number."""
    if len(references) != 10:
        raise ValueError(f"TextVQA's rule needs 10 references, got {len(references)}")
    return leave_one_out(m4c_normalise(text), [m4c_normalise(reference) for reference in references])


def question_of(prompt: str) -> str:
    """Return the lower-case question of a prompt; together with the image id it is the key of the annotation.

    Raises ValueError for a prompt with another format, for example with a newline inside an OCR token.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found is not None:
            return found.group(1).lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"not a TextVQA prompt of LLaVA: {prompt!r}")
