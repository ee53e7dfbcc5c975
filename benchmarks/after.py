"""Two tasks with pictures, one after the other, in both orders: emoji and easy-VQA on smol-llava.

python benchmarks/after.py [--steps 50] [--questions 200] [--ways after lora] [--first emoji easy-vqa] [--seed 42]

It needs the folders of `python -m milora_data emoji` and `easy-vqa` in data/. Each chain is two commands of
`milora_vl.train`: the demo's recipe and `--after`, or a LoRA of as many trained numbers and `--adapter`. Prints a JSON
line for each chain: the scores of the base, after the first run and after the second, on both tasks; and
`kept`, the part of the first task's gain over the base that is left. Finished runs in runs/after are not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from all import ROOT

RUNS, DATA = ROOT / "runs" / "after", ROOT / "data"
TASKS = ("emoji", "easy-vqa")
LORA = ("--method", "lora", "--rank", "32", "--learning_rate", "1e-3", "--mm_projector_lr", "1e-3")


def main() -> None:
    """Train and measure the chains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="of each task, with 8 records")
    parser.add_argument("--questions", type=int, default=200, help="held-out questions of each task")
    parser.add_argument("--ways", nargs="+", default=["after", "lora"], choices=("after", "lora"))
    parser.add_argument("--first", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    for way in options.ways:
        for first in options.first:
            print(json.dumps(chain(way, first, options.steps, options.questions, options.seed)), flush=True)


def chain(way: str, first: str, steps: int, questions: int, seed: int) -> dict[str, object]:
    """Train the task `first` and then the other one; return the scores."""
    second = next(task for task in TASKS if task != first)
    start, end = (RUNS / f"{way}-{order}-{steps}-{seed}" for order in (first, f"{first}-{second}"))
    recipe = ("--recipe", "smol-llava-demo", *(LORA if way == "lora" else ()))
    train(start, DATA / first, steps, seed, *recipe)
    train(end, DATA / second, steps, seed, "--after" if way == "after" else "--adapter", start)
    scores: dict[str, list[float]] = {}
    for task in TASKS:
        scores[task] = [*scored(start, task, questions, "--with_base"), *scored(end, task, questions)]
    base, learned, left = scores[first]
    return {
        "way": way, "first": first, "steps": steps, "seed": seed, "questions": questions, "scores": scores,
        "kept": round((left - base) / (learned - base), 3),
    }  # fmt: skip


def train(folder: Path, records: Path, steps: int, seed: int, *flags: object) -> None:
    """Train on train.json and images in the folder `records`, or continue; a finished run stays."""
    if (folder / "adapter_config.json").exists():
        return
    data = ("--data_path", records / "train.json", "--image_folder", records / "images")
    own = ("--max_steps", steps, "--save_steps", 25, "--eval_strategy", "no", "--seed", seed, "--output_dir", folder)
    module("milora_vl.train", *flags, *data, *own, "--resume", "auto")


def scored(folder: Path, task: str, questions: int, *flags: str) -> list[float]:
    """Return the score of the run in `folder`, after the score of the base with the flag --with_base."""
    suite: tuple[object, ...] = ("--suite", "emoji", "--data", DATA / "emoji")
    if task == "easy-vqa":
        asked = RUNS / "easy-vqa.json"  # answers are stored under the name of the file
        shutil.copy(DATA / task / "test.json", asked)
        suite = ("--benchmarks", asked, "--data", DATA / task / "images")
    own = ("--limit", questions, "--forgetting_tokens", 0, "--output_dir", folder, "--format", "json")
    found = json.loads(module("milora_eval", "run", "--adapter", folder, *suite, *own, *flags))
    return [which["benchmarks"][0]["metrics"][0]["value"] for which in found.values()]


def module(name: str, *words: object) -> str:
    """Run a command of the package; return what it printed."""
    command = [sys.executable, "-m", name, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
