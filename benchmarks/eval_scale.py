"""Memory of `milora_eval run` on many questions, beyond the model: reading, ordering, asking, scoring.

python benchmarks/eval_scale.py [--questions 200000]   prints a JSON line, with a tenth of the questions beside it

The model is tiny. A first process stops after its first batch, so it has read and ordered all questions. A second one
finds recorded answers to all questions but 64, asks those and scores all. Both report by how much their resident
memory exceeds the memory of a process that has answered one question.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from milora_eval import run
from milora_eval.answers.lines import to_line
from milora_eval.answers.questions import EvaluationPlan, Questions, read_items
from milora_eval.answers.store import Store, write_lines
from milora_eval.benchmarks.own_data import OwnData
from milora_eval.evaluate import results_folder, settings
from milora_vl.models.generate import Prompt, generate
from milora_vl.tiny import tiny_llava

ASKED = 64
PICTURES = 500


class _Enough(Exception):
    """Ends a run after its first batch."""


def main() -> None:
    """Measure both numbers of questions, and print what a million would take if memory grows in proportion."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--questions", type=int, default=200_000)
    options.add_argument("--part", choices=("record", "order", "run"), help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.part is not None:
        print(json.dumps({"record": record, "order": order, "run": answer}[chosen.part](chosen.folder)))
        return
    sizes = chosen.questions // 10, chosen.questions
    small, large = (measure(size) for size in sizes)
    peaks = [max(measured["order"]["mb"], measured["run"]["mb"]) for measured in (small, large)]
    each = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    result = {
        "questions": chosen.questions,
        **{f"{part}_mb": large[part]["mb"] for part in ("order", "run")},
        **{f"{part}_s": large[part]["seconds"] for part in ("order", "run")},
        "peak_mb_of_a_tenth": peaks[0],
        "peak_mb": peaks[1],
        "million_mb": round(peaks[1] + each * (1_000_000 - chosen.questions)),
    }
    print(json.dumps(result))


def measure(count: int) -> dict[str, Any]:
    """Return the memory and the seconds of both runs on `count` questions."""
    with tempfile.TemporaryDirectory() as folder:
        write_questions(Path(folder), count)
        command = [sys.executable, __file__, "--folder", folder, "--part"]
        return {part: _output([*command, part]) for part in ("order", "record", "run")}


def write_questions(folder: Path, count: int) -> None:
    """Write questions.jsonl: every second question is about one of `PICTURES` pictures, the others have no picture."""
    (folder / "images").mkdir()
    for number in range(PICTURES):
        Image.new("RGB", (32, 32), (number % 256, number // 256, 0)).save(folder / "images" / f"{number}.png")
    with (folder / "questions.jsonl").open("w") as file:
        for number in range(count):
            row: dict[str, Any] = {
                "id": f"q{number}",
                "question": f"Is there a thing number {number}?",
                "answer": "yes",
            }
            if number % 2:
                row["image"] = f"{number % PICTURES}.png"
            file.write(json.dumps(row | {"metric": "yes_no"}) + "\n")


def record(folder: Path) -> None:
    """Store an answer to all questions but `ASKED`."""
    plan, questions = _questions(folder)
    target = results_folder(folder, plan.suite, plan.which)
    shutil.rmtree(target, ignore_errors=True)

    def lines() -> Iterator[dict[str, Any]]:
        for place in range(len(questions) - ASKED):
            question = questions[place]
            yield to_line(question.benchmark, question.item, ("yes", "no")[place % 2], question.key, folder)

    write_lines(Store(target).path, lines())


def order(folder: Path) -> dict[str, Any]:
    """Run until the first batch is answered."""

    def enough(*batch: Any) -> None:
        raise _Enough

    Store.append = enough  # type: ignore[method-assign]
    return _measured(folder)


def answer(folder: Path) -> dict[str, Any]:
    """Run to the end."""
    return _measured(folder)


def _measured(folder: Path) -> dict[str, Any]:
    model, processor = tiny_llava()
    one = folder / "one.jsonl"
    one.write_text(json.dumps({"question": "What?", "answer": "yes", "image": "0.png"}) + "\n")
    (item,) = OwnData(str(one)).load(folder)
    generate(model, processor, [Prompt(item.turns, item.images)], max_new_tokens=2)
    before, start = _resident("VmRSS"), time.perf_counter()
    benchmark = OwnData(str(folder / "questions.jsonl"))
    benchmark.max_new_tokens = 2
    with suppress(_Enough):
        run(model, processor, [benchmark], data_dir=folder, output_dir=folder)
    return {"mb": round((_resident("VmHWM") - before) / 1e3), "seconds": round(time.perf_counter() - start, 1)}


def _questions(folder: Path) -> tuple[EvaluationPlan, Questions]:
    model, processor = tiny_llava()
    benchmark = OwnData(str(folder / "questions.jsonl"))
    benchmark.max_new_tokens = 2
    plan = EvaluationPlan(
        suite=benchmark.name,
        benchmarks=(benchmark,),
        data_dir=folder,
        settings=settings(model, processor, None, "vicuna_v1", "pad"),
    )
    return plan, Questions(plan, read_items(plan.benchmarks, folder))


def _output(command: list[str]) -> Any:
    """Run one part in its own process, whose peak of memory is then its own."""
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def _resident(name: str) -> float:
    """Return a value of /proc/self/status in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name)))


if __name__ == "__main__":
    main()
