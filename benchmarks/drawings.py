"""The default against LoRA on drawings that no study uses: stamps of Tux Paint in ten kinds, on smol-llava.

apt-get install tuxpaint-stamps-default
python benchmarks/drawings.py [--rates 1e-3] [--lora_rates 3e-4 1e-3] [--seed 42]

Each drawing has two questions: its kind, and yes or no about a kind. A tenth of the drawings gives the validation loss,
by which a rate is chosen, a quarter the score. The product's commands with their defaults, but the rank, so that both
train about as many numbers, the rate and 40 steps. Prints a JSON line for each run: the validation loss, the score, and
the KL from the base on general text and about drawn shapes. Finished runs in runs/drawings are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.timing import ROOT

RUNS = ROOT / "runs" / "drawings"
STAMPS = Path("/usr/share/tuxpaint/stamps")
KINDS = {
    "animals": "animal", "clothes": "clothes", "food": "food", "household": "household", "people": "person",
    "plants": "plant", "seasonal": "season", "space": "space", "town": "town", "vehicles": "vehicle",
}  # fmt: skip
SHORT = "\nAnswer the question using a single word or phrase."
KIND = "<image>\nWhich kind of drawing is this: " + ", ".join(KINDS.values()) + "?"


def main() -> None:
    """Write the records, train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="with 8 records")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-3])
    parser.add_argument("--lora_rates", nargs="*", type=float, default=[3e-4, 1e-3])
    options = parser.parse_args()
    write_data(RUNS / "data")
    ways = [("default", rate, ("--rank", 64)) for rate in options.rates]
    ways += [("lora", rate, ("--method", "lora", "--rank", 32)) for rate in options.lora_rates]
    for way, rate, flags in ways:
        folder = RUNS / f"{way}-{rate:g}-{options.steps}-{options.seed}"
        train(folder, options.steps, options.seed, "--learning_rate", rate, *flags)
        print(json.dumps({"way": way, "rate": rate, "seed": options.seed, **measured(folder)}), flush=True)


def write_data(folder: Path) -> None:
    """Write train.json, val.json, drawings.json and the pictures on white, unless they are there."""
    if (folder / "drawings.json").exists():
        return
    stamps = sorted(path for path in STAMPS.rglob("*.png") if path.relative_to(STAMPS).parts[0] in KINDS)
    if not stamps:
        raise SystemExit(f"{STAMPS} has no drawings: apt-get install tuxpaint-stamps-default")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    records: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "drawings": []}
    for rank, place in enumerate(torch.randperm(len(stamps), generator=generator).tolist()):
        split = "val" if rank < len(stamps) // 10 else "drawings" if rank < len(stamps) * 35 // 100 else "train"
        parts = stamps[place].relative_to(STAMPS).with_suffix("").parts
        name, kind = "-".join(parts), KINDS[parts[0]]
        drawing = Image.open(stamps[place]).convert("RGBA")
        drawing.thumbnail((192, 192))
        picture = Image.new("RGB", (224, 224), "white")
        picture.paste(drawing, ((224 - drawing.width) // 2, (224 - drawing.height) // 2), drawing)
        picture.save(folder / "images" / f"{name}.png")
        others = [other for other in KINDS.values() if other != kind]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        is_kind = bool(torch.randint(2, (), generator=generator))
        asked = f"<image>\nDoes this drawing belong to the kind {kind if is_kind else other}?"
        for about, question, answer in (("kind", KIND, kind), ("yes_no", asked, "Yes" if is_kind else "No")):
            turns = [{"from": "human", "value": question + SHORT}, {"from": "gpt", "value": answer}]
            records[split].append(
                {"id": f"{about}-{name}", "image": f"{name}.png", "conversations": turns, "type": about}
            )
    for split, found in records.items():
        (folder / f"{split}.json").write_text(json.dumps(found), encoding="utf-8")


def train(folder: Path, steps: int, seed: int, *flags: object) -> None:
    """Train on the drawings, or continue; a finished run stays."""
    if (folder / "adapter_config.json").exists():
        return
    data = RUNS / "data"
    records = ("--data_path", data / "train.json", "--image_folder", data / "images")
    held = ("--eval_data_path", data / "val.json", "--eval_strategy", "steps", "--eval_steps", steps)
    own = ("--per_device_train_batch_size", 8, "--max_steps", steps, "--save_steps", 25, "--seed", seed)
    module(
        "milora_vl.train", "--model", "smol-llava", *records, *held, *own, *flags, "--output_dir", folder, "--resume",
        "auto",
    )  # fmt: skip


def module(name: str, *words: object) -> str:
    """Run a command of the package; return what it printed."""
    command = [sys.executable, "-m", name, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def measured(folder: Path) -> dict[str, float]:
    """Return validation loss and score of a run, and the KL from the base on text and about drawn shapes."""
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    loss = next(entry["eval_loss"] for entry in reversed(log) if "eval_loss" in entry)
    asked = ["--benchmarks", RUNS / "data" / "drawings.json", "--data", RUNS / "data" / "images"]
    own = ["--adapter", folder, "--output_dir", folder, "--format", "json"]
    answered = json.loads(module("milora_eval", "run", *asked, "--forgetting_tokens", 0, *own))
    probes = json.loads(module("milora_vl.forgetting", "--on", "text,pictures", *own))
    score = answered["final"]["benchmarks"][0]["metrics"][0]["value"]
    found = {"validation_loss": loss, "score": score, **{name: probes[name]["kl"] for name in ("text", "pictures")}}
    return {name: round(value, 4) for name, value in found.items()}


if __name__ == "__main__":
    main()
