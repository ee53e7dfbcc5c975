"""MME: two yes/no questions per picture in fourteen subtasks; up to 200 points per subtask.

Scores follow calculation.py of the benchmark's eval_tool.zip. LLaVA's questions omit "Please answer yes or no." and ask
for a single word or phrase; its convert_answer_to_mme.py restores the sentence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milora_eval.benchmark import Answer, Benchmark, Item, Metric
from milora_eval.benchmarks.llava_prompts import SHORT, picture_item
from milora_eval.data_files import find
from milora_eval.rules.mme import COGNITION, PERCEPTION, mme_answer, mme_score
from milora_eval.stats import mean_stderr
from milora_vl.common.atomic_write import write_text
from milora_vl.common.errors import DataError, UserError

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
        """Return 1.0 if the yes or no is right."""
        return float(mme_answer(text) == item.answers[0].lower())

    def summarise(self, answers: Iterable[Answer]) -> list[Metric]:
        """Return the two sums and the points of each subtask; a picture counts only if both answers exist."""
        by_task: dict[str, dict[str, list[Answer]]] = defaultdict(lambda: defaultdict(list))
        for answer in answers:
            by_task[answer.item.kind][answer.item.group].append(answer)
        tasks = [metric for name, pictures in by_task.items() if (metric := _points(name, pictures)) is not None]
        sums = [("perception", PERCEPTION), ("cognition", COGNITION)]
        totals = [_total(name, [task for task in tasks if task.name in names]) for name, names in sums]
        return [*(total for total in totals if total is not None), *tasks]

    def llava_keys(self, item: Item) -> tuple[Any, ...]:
        """Return (picture, question)."""
        return ((item.meta["question_id"], item.question.removeprefix("<image>\n").removesuffix(SHORT)),)

    def llava_key(self, line: Mapping[str, Any]) -> Any:
        """Return (picture, question)."""
        question = line["prompt"].removesuffix(SHORT)
        return line["question_id"], question.removesuffix(YES_OR_NO).rstrip()

    def submission(self, answers: Sequence[Answer], folder: Path, data_dir: Path) -> list[Path]:
        """Write one text file per subtask for calculation.py: picture, question, truth, answer; pairs are adjacent."""
        tasks: dict[str, dict[str, list[Answer]]] = defaultdict(lambda: defaultdict(list))
        for answer in answers:
            tasks[answer.item.kind][answer.item.group].append(answer)
        files = []
        for name, pictures in tasks.items():
            pairs = [pair for pair in pictures.values() if len(pair) == 2]
            lines = [_line(answer) for pair in pairs for answer in pair]
            files.append(write_text(folder / f"{name}.txt", "".join(lines)))
        return files


def _subtask(folder: Path) -> list[Item]:
    items = []
    for file in sorted([*folder.glob("*.txt"), *folder.glob("questions_answers_YN/*.txt")]):
        picture = _picture(folder, file.stem)
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate((line for line in lines if line.strip()), start=1):
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip() not in ("Yes", "No"):
                raise DataError(
                    f"expected a question, a tab, Yes or No; got {line[:80]!r}",
                    code="benchmark-file-format",
                    where=f"{file}:{number}",
                )
            place = picture.relative_to(folder.parent).as_posix()
            item = picture_item(
                place,
                question.strip().removesuffix(YES_OR_NO).rstrip() + SHORT,
                picture,
                name=f"{folder.name}/{picture.name}/{number}",
                answers=[answer.strip()],
                kind=folder.name,
                group=f"{folder.name}/{picture.name}",
                meta={"question": question, "image": place},
            )
            items.append(item)
    return items


def _picture(folder: Path, stem: str) -> Path:
    for place in (folder, folder / "images"):
        for ending in (".jpg", ".png", ".jpeg"):
            if (place / (stem + ending)).is_file():
                return place / (stem + ending)
    raise UserError(
        f"no picture {stem}.jpg or .png in {folder} or {folder / 'images'}",
        code="benchmark-missing-pictures",
        where="benchmark mme",
        hint="copy the pictures of the release into one of these folders",
    )


def _points(name: str, pictures: Mapping[str, list[Answer]]) -> Metric | None:
    pairs = [pair for pair in pictures.values() if len(pair) == 2]
    if not pairs:
        return None
    per_picture = [mme_score([a.text for a in pair], [a.item.answers[0] for a in pair]) for pair in pairs]
    lines = [answer for pair in pairs for answer in pair]
    points = mme_score([a.text for a in lines], [a.item.answers[0] for a in lines])
    return Metric(name, points, mean_stderr(per_picture), len(lines), unit="points")


def _total(name: str, tasks: list[Metric]) -> Metric | None:
    """Return the sum of the subtasks; their errors are treated as independent."""
    if not tasks:
        return None
    errors = [task.stderr for task in tasks if task.stderr is not None]
    stderr = sum(error**2 for error in errors) ** 0.5 if len(errors) == len(tasks) else None
    return Metric(name, sum(task.value for task in tasks), stderr, sum(task.n for task in tasks), unit="points")


def _line(answer: Answer) -> str:
    item = answer.item
    text = " ".join(answer.text.split())  # a tab or newline would end the column
    return f"{Path(item.images[0]).name}\t{item.meta['question'].strip()}\t{item.answers[0]}\t{text}\n"
