"""TextVQA, val 0.5.1, with and without the OCR tokens that LLaVA adds to the prompt (they gain about ten points).

Scores follow the M4C rule (llava/eval/m4c_evaluator.py). LLaVA's answers are joined by picture and question, because
its question file uses the picture as the question_id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_data.formats.jsonfile import read_json
from milora_eval.benchmark import Answer, Benchmark, Item, plain_text
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.data_files import find, is_table, read_jsonl, table_rows, write_rows
from milora_eval.rules.textvqa import question_of, textvqa_accuracy
from milora_vl.common.errors import DataError

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

    def load(self, data_dir: Path) -> list[Item]:
        """Read the questions and their tokens."""
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
            raise DataError(
                f"question {odd['question_id']} has {len(odd['answers'])} answers, expected ten",
                code="benchmark-file-format",
                where=self.files[0],
                hint="use the published file, unchanged",
            )
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
        """Return the accuracy over the ten annotators."""
        return textvqa_accuracy(text, item.answers) if item.answers else None

    def llava_keys(self, item: Item) -> tuple[Any, ...]:
        """Return (picture, question)."""
        return ((item.meta["question_id"], question_of(plain_text(item))),)

    def llava_key(self, line: Mapping[str, Any]) -> Any:
        """Return (picture, question)."""
        return line["question_id"], question_of(line["prompt"])

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write [{question_id, answer}] for the EvalAI server."""
        rows = [{"question_id": a.item.meta["server_id"], "answer": a.text} for a in answers]
        return [write_rows(folder / "textvqa_val.json", rows)]

    def _texts(self, data_dir: Path, entries: list[dict[str, Any]]) -> list[str]:
        path = find(self, data_dir, self.files[2])
        if path.name == LLAVA_FILE:
            known = {(line["question_id"], question_of(line["text"])): line["text"] for line in read_jsonl(path)}
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
