"""MME: two yes/no questions per picture in fourteen subtasks; up to 200 points per subtask.

Scores follow calculation.py of the benchmark's eval_tool.zip. LLaVA's questions omit "Please answer yes or no." and ask
for a single word or phrase; its convert_answer_to_mme.py restores the sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from milora_eval.benchmark import Answer, Benchmark, Item, Metric, grouped
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.data_files import find
from milora_eval.stats import mean_stderr
from milora_vl.common.atomic_write import write_text
from milora_vl.common.errors import DataError, UserError

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = "Please answer yes or no."


class MME(Benchmark):
    """Perception (the number that LLaVA-1.5 reports), cognition, and every subtask, in points."""

    name = "mme"
    files = ("MME_Benchmark_release_version|MME_Benchmark|existence/..",)
    folders = ("MME",)
    source = "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation)"
    metric = "perception"

    def load(self, data_dir: Path) -> list[Item]:
        """Read the subtasks that exist; a picture is next to its text file or in `images`."""
        root = find(self, data_dir, self.files[0])
        root = root / "MME_Benchmark" if (root / "MME_Benchmark").is_dir() else root
        return [item for name in (*PERCEPTION, *COGNITION) if (root / name).is_dir() for item in _subtask(root / name)]

    def score(self, item: Item, text: str) -> float:
        return float(mme_answer(text) == item.answers[0].lower())

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the two sums and the points of each subtask; a picture counts only if both answers exist."""
        tasks = [_points(name, pairs) for name, pairs in _pairs(answers).items() if pairs]
        sums = [("perception", PERCEPTION), ("cognition", COGNITION)]
        totals = [_total(name, [task for task in tasks if task.name in names]) for name, names in sums]
        return [*(total for total in totals if total is not None), *tasks]

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write one text file per subtask for calculation.py: picture, question, truth, answer; pairs are adjacent."""
        return [
            write_text(folder / f"{name}.txt", "".join(_line(answer) for pair in pairs for answer in pair))
            for name, pairs in _pairs(answers).items()
        ]


def mme_answer(text: str) -> Literal["yes", "no", "other"]:
    """Return "yes", "no" or "other": the whole answer counts, else "yes", then "no", in its first four characters.

    >>> mme_answer("Yes, it is"), mme_answer("not sure"), mme_answer("y")
    ('yes', 'no', 'other')
    """
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def mme_score(texts: Sequence[str], labels: Sequence[str]) -> float:
    """Return 100 x accuracy + 100 x the share of pictures with both questions right; two adjacent lines are a picture.

    Raises ValueError for an odd number of lines.
    """
    right = [mme_answer(text) == label.lower() for text, label in zip(texts, labels, strict=True)]
    if len(right) % 2:
        raise ValueError(f"MME has two questions per picture, got {len(right)} answers")
    if not right:
        return 0.0
    both = sum(first and second for first, second in zip(right[::2], right[1::2], strict=True))
    return 100 * sum(right) / len(right) + 100 * both / (len(right) // 2)


def _subtask(folder: Path) -> list[Item]:
    items = []
    for file in sorted([*folder.glob("*.txt"), *folder.glob("questions_answers_YN/*.txt")]):
        picture = _picture(folder, file.stem)
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate((line for line in lines if line.strip()), start=1):
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip() not in ("Yes", "No"):
                message = f"expected a question, a tab, Yes or No; got {line[:80]!r}"
                raise DataError(message, code="benchmark-file-format", where=f"{file}:{number}")
            image = picture.relative_to(folder.parent).as_posix()
            item = picture_item(
                image,
                question.strip().removesuffix(YES_OR_NO).rstrip() + SHORT,
                picture,
                name=f"{folder.name}/{picture.name}/{number}",
                answers=[answer.strip()],
                kind=folder.name,
                group=f"{folder.name}/{picture.name}",
                meta={"question": question, "image": image},
            )
            items.append(item)
    return items


def _picture(folder: Path, stem: str) -> Path:
    for each in (folder, folder / "images"):
        for ending in (".jpg", ".png", ".jpeg"):
            if (each / (stem + ending)).is_file():
                return each / (stem + ending)
    message, hint = (
        f"no picture {stem}.jpg or .png in {folder} or {folder / 'images'}",
        "copy the release's pictures there",
    )
    raise UserError(message, code="benchmark-missing-pictures", where="benchmark mme", hint=hint)


def _pairs(answers: Iterable[Answer]) -> dict[str, list[list[Answer]]]:
    """Return, per subtask, the two answers about each picture; a picture with one answer is left out."""
    return {
        task: [pair for pair in grouped(part, lambda answer: answer.item.group).values() if len(pair) == 2]
        for task, part in grouped(answers).items()
    }


def _points(name: str, pairs: Sequence[Sequence[Answer]]) -> Metric:
    per_picture = [mme_score([a.text for a in pair], [a.item.answers[0] for a in pair]) for pair in pairs]
    lines = [answer for pair in pairs for answer in pair]
    points = mme_score([a.text for a in lines], [a.item.answers[0] for a in lines])
    return Metric(name, points, mean_stderr(per_picture), len(lines), unit="points")


def _total(name: str, tasks: list[Metric]) -> Metric | None:
    if not tasks:
        return None
    errors = [task.stderr for task in tasks if task.stderr is not None]
    stderr = sum(error**2 for error in errors) ** 0.5 if len(errors) == len(tasks) else None
    return Metric(name, sum(task.value for task in tasks), stderr, sum(task.n for task in tasks), unit="points")


def _line(answer: Answer) -> str:
    item = answer.item
    text = " ".join(answer.text.split())  # a tab or newline would end the column
    return f"{Path(item.images[0]).name}\t{item.meta['question'].strip()}\t{item.answers[0]}\t{text}\n"
