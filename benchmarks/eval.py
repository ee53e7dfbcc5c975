"""Evaluation: shared pictures against batch size 1, VQAv2 scoring against the plain rules, and memory.

python benchmarks/eval.py [--model smol-llava] [--pictures 16] [--questions 6] [--answers 200000]
    [--predictions 1000000]   prints a JSON line
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from milora_data.records.record import Turn
from milora_eval.answers.store import PREDICTIONS, to_line
from milora_eval.benchmarks import vqa
from milora_eval.benchmarks.llava_prompts import picture_item
from milora_vl.interop.load_model import load_model
from milora_vl.models.generate import Prompt, generate

# VmHWM restarts at exec; the peak of getrusage would include this process.
SCORE_ALONE = """
from pathlib import Path
from milora_eval.scores.results import numbers
numbers(Path({folder!r}), "")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
ROUNDS = 2
THINGS = ("dog", "chair", "cup", "person", "tree", "car", "bottle", "bird", "table", "book")


def main() -> None:
    """Measure everything and print the ratios."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smol-llava")
    options.add_argument("--pictures", type=int, default=16)
    options.add_argument("--questions", type=int, default=6)
    options.add_argument("--batch_size", type=int, default=32)
    options.add_argument("--answers", type=int, default=200_000)
    options.add_argument("--predictions", type=int, default=1_000_000)
    chosen = options.parse_args()
    measured = asking(chosen.model, chosen.pictures, chosen.questions, chosen.batch_size) | scoring(chosen.answers)
    print(json.dumps(measured | memory(chosen.predictions)))


def asking(name: str, num_pictures: int, num_questions: int, batch_size: int) -> dict[str, Any]:
    """Ask several POPE-like questions per picture: one by one, like LLaVA's scripts, and in batches; alternately."""
    model, processor = load_model(name)
    rng = random.Random(0)
    prompts = []
    for _ in range(num_pictures):
        picture = drawing(rng)
        for thing in rng.sample(THINGS, num_questions):
            text = f"<image>\nIs there a {thing} in the image?\nAnswer the question using a single word or phrase."
            prompts.append(Prompt((Turn("user", text),), (picture,)))
    options: dict[str, Any] = {"max_new_tokens": 4}
    ways: dict[str, dict[str, Any]] = {
        "shared": {"batch_size": batch_size},
        "batched": {"batch_size": batch_size, "share_pictures": False},
        "batch1": {"batch_size": 1, "share_pictures": False},
    }
    generate(model, processor, prompts[:2], **options)
    times: dict[str, list[float]] = {way: [] for way in ways}
    said: dict[str, list[str]] = {}
    for _ in range(ROUNDS):
        for way, how in ways.items():
            took, said[way] = timed(lambda how=how: generate(model, processor, prompts, **how, **options))
            times[way].append(took)
    seconds = {way: statistics.median(own) for way, own in times.items()}
    return {
        "model": name,
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        "questions": len(prompts),
        **{f"{way}_s": round(took, 2) for way, took in seconds.items()},
        "speedup_over_batch1": round(seconds["batch1"] / seconds["shared"], 2),
        "changed_answers": sum(a != b for a, b in zip(said["shared"], said["batch1"], strict=True)),
    }


def memory(count: int) -> dict[str, Any]:
    """Return the peak memory of scoring a tenth of the stored answers and all of them, each in its own process."""
    peaks = []
    for number in (count // 10, count):
        with tempfile.TemporaryDirectory() as folder:
            write_predictions(Path(folder), number)
            code = SCORE_ALONE.format(folder=folder)
            command = [sys.executable, "-c", code]
            seconds, done = timed(lambda c=command: subprocess.run(c, stdout=subprocess.PIPE, check=True))
            peaks.append((int(done.stdout), seconds))
    (small, _), (large, seconds) = peaks
    return {
        "predictions": count,
        "score_s": round(seconds, 1),
        "peak_mb_of_a_tenth": round(small / 1024),
        "peak_mb": round(large / 1024),
    }


def write_predictions(folder: Path, count: int) -> None:
    """Write predictions.jsonl for VQAv2, line by line."""
    benchmark, data = vqa.VQAv2(), Path("data")
    with (folder / PREDICTIONS).open("w", encoding="utf-8") as file:
        for i in range(count):
            picture = data / "val2014" / f"COCO_val2014_{i // 6:012d}.jpg"
            votes, meta = ["yes"] * 7 + ["no"] * 3, {"question_type": "is there a"}
            item = picture_item(i, "Is there a dog?", picture, answers=votes, kind="yes/no", meta=meta)
            file.write(json.dumps(to_line(benchmark, item, ("yes", "no", "2")[i % 3], f"{i:016x}", data)) + "\n")


def drawing(rng: random.Random) -> Image.Image:
    """Return a picture with a few shapes."""
    picture = Image.new("RGB", (320, 240), tuple(rng.randbytes(3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(5):
        x, y = rng.randrange(260), rng.randrange(180)
        draw.ellipse((x, y, x + 60, y + 60), fill=tuple(rng.randbytes(3)))
    return picture


def scoring(count: int) -> dict[str, Any]:
    """Measure VQAv2 scoring of `count` answers, drawn from a few thousand texts as in real answers."""
    rng = random.Random(0)
    words = [f"{rng.choice(('the ', '', 'a '))}{thing}{rng.choice(('', 's', '.', ', red'))}" for thing in THINGS * 300]
    words += ["yes", "no", "2", "two", "dont know", "1,000", "black-white"] * 200
    cases = [(rng.choice(words), [rng.choice(words) for _ in range(3)] + ["yes"] * 7) for _ in range(count)]
    ours, fast = timed(lambda: [vqa.vqav2_accuracy(text, references) for text, references in cases])
    theirs, plain = timed(lambda: [plain_accuracy(text, references) for text, references in cases])
    return {
        "answers": count,
        "plain_rules_s": round(theirs, 2),
        "ours_s": round(ours, 2),
        "scoring_speedup": round(theirs / ours, 2),
        "scores_differ": sum(abs(a - b) > 1e-12 for a, b in zip(fast, plain, strict=True)),
    }


def plain_accuracy(text: str, references: Sequence[str]) -> float:
    """Return the accuracy by a literal implementation: normalise every answer, leave out each annotator in turn."""
    text, references = vqa.clean(text), [vqa.clean(reference) for reference in references]
    if len(set(references)) > 1:
        text, references = plain_normalise(text), [plain_normalise(reference) for reference in references]
    total = 0.0
    for left_out in range(len(references)):
        others = [reference for place, reference in enumerate(references) if place != left_out]
        total += min(1.0, sum(reference == text for reference in others) / 3)
    return total / len(references)


def plain_normalise(text: str) -> str:
    """Return the normal form, computed mark by mark and word by word."""
    before = text
    for mark in vqa.PUNCTUATION:
        beside_blank = f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if beside_blank or vqa._COMMA.search(before) else " ")
    return vqa.normalise_words(vqa._PERIOD.sub("", text, count=32))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds and the result of a call."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
