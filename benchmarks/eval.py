"""Evaluation: shared pictures against batch size 1, and VQAv2 scoring against the plain rules.

python benchmarks/eval.py [--model smol-llava] [--pictures 16] [--answers 200000]    prints a JSON line
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageDraw

from benchmarks.timing import alternately, timed
from milora_data.records.record import Turn
from milora_eval.benchmarks import vqa
from milora_vl.interop.load_model import load_model
from milora_vl.models.generate import Prompt, Reply, generate

ROUNDS, QUESTIONS, BATCH = 2, 6, 32
THINGS = ("dog", "chair", "cup", "person", "tree", "car", "bottle", "bird", "table", "book")


def main() -> None:
    """Measure everything and print the ratios."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smol-llava")
    options.add_argument("--pictures", type=int, default=16)
    options.add_argument("--answers", type=int, default=200_000)
    chosen = options.parse_args()
    print(json.dumps(asking(chosen.model, chosen.pictures) | scoring(chosen.answers)))


def asking(name: str, num_pictures: int) -> dict[str, Any]:
    """Ask several POPE-like questions per picture: one by one, like LLaVA's scripts, and in batches; alternately."""
    model, processor = load_model(name)
    rng = random.Random(0)
    prompts = []
    for _ in range(num_pictures):
        picture = drawing(rng)
        for thing in rng.sample(THINGS, QUESTIONS):
            text = f"<image>\nIs there a {thing} in the image?\nAnswer the question using a single word or phrase."
            prompts.append(Prompt((Turn("user", text),), (picture,)))
    options: dict[str, Any] = {"max_new_tokens": 4}
    ways: dict[str, dict[str, Any]] = {
        "shared": {"batch_size": BATCH},
        "batched": {"batch_size": BATCH, "share_pictures": False},
        "batch1": {"batch_size": 1, "share_pictures": False},
    }
    said: dict[str, list[Reply]] = {}

    def ask(way: str) -> None:
        said[way] = generate(model, processor, prompts, **ways[way], **options)

    generate(model, processor, prompts[:2], **options)
    times = alternately({way: partial(ask, way) for way in ways}, ROUNDS)
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


if __name__ == "__main__":
    main()
