"""The default against LoRA on pictures and names that no study uses: Font Awesome's icons, on smol-llava.

pip install fontawesomefree && python benchmarks/icons.py [--steps 40] [--seed 42] [--lora_rates 5e-4 1e-3]

Draws icons in one of eight colors; the questions ask for their group and their color, and a fifth of the icons is held
out. The demo's recipe with these records, and LoRA with as many trained numbers and the same projector. Prints a JSON
line for each run: the score on the held-out icons, and the KL from the base on general text and about drawn shapes.
Finished runs in runs/icons are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

from benchmarks.timing import ROOT

RUNS = ROOT / "runs" / "icons"
GROUPS = (
    "animals", "arrows", "buildings", "clothing", "food", "hands", "mathematics", "medical", "music", "sports",
    "transportation", "weather",
)  # fmt: skip
COLORS = {
    "red": "#d62728", "green": "#2ca02c", "blue": "#1f4fb4", "orange": "#ff7f0e", "purple": "#7b3fb5",
    "brown": "#7a4a2b", "pink": "#f178c0", "gray": "#7f7f7f",
}  # fmt: skip
SHORT = "\nAnswer the question using a single word or phrase."
GROUP, COLOR = "<image>\nWhich group does this icon belong to?", "<image>\nWhat is the color of this icon?"


def main() -> None:
    """Write the records, train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="with 8 records")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--lora_rates", nargs="*", type=float, default=[5e-4, 1e-3])
    options = parser.parse_args()
    write_data(RUNS / "data")
    ways: dict[str, list[object]] = {"default": []}
    for rate in options.lora_rates:
        ways[f"lora-{rate:g}"] = ["--method", "lora", "--rank", 32, "--learning_rate", rate, "--mm_projector_lr", 1e-3]
    for name, flags in ways.items():
        folder = RUNS / f"{name}-{options.steps}-{options.seed}"
        train(folder, RUNS / "data", options.steps, options.seed, "--recipe", "smol-llava-demo", *flags)
        print(json.dumps({"way": name, "steps": options.steps, "seed": options.seed, **measured(folder)}), flush=True)


def write_data(folder: Path) -> None:
    """Draw the icons and write train.json and icons.json, unless they are there."""
    if (folder / "icons.json").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    spec = find_spec("fontawesomefree")
    if spec is None or spec.origin is None:
        raise SystemExit("the package fontawesomefree is missing: pip install fontawesomefree")
    source = next(Path(spec.origin).parent.rglob("metadata/icons.yml")).parents[1]
    icons = yaml.safe_load((source / "metadata" / "icons.yml").read_text(encoding="utf-8"))
    font = ImageFont.truetype(str(source / "webfonts" / "fa-solid-900.ttf"), 72)
    generator = torch.Generator().manual_seed(0)
    groups = groups_of(source / "metadata" / "categories.yml")
    names = [name for name in sorted(groups) if "solid" in icons[name]["styles"]]
    records: dict[str, list[dict[str, Any]]] = {"train": [], "icons": []}
    for place in torch.randperm(len(names), generator=generator).tolist():
        name, split = names[place], "icons" if len(records["icons"]) < 2 * (len(names) // 5) else "train"
        color = list(COLORS)[int(torch.randint(len(COLORS), (), generator=generator))]
        picture = Image.new("RGB", (128, 128), "white")
        glyph = chr(int(icons[name]["unicode"], 16))
        ImageDraw.Draw(picture).text((64, 64), glyph, font=font, fill=COLORS[color], anchor="mm")
        picture.save(folder / "images" / f"{name}.png")
        for kind, question, answer in (("group", GROUP, groups[name]), ("color", COLOR, color)):
            turns = [{"from": "human", "value": question + SHORT}, {"from": "gpt", "value": answer}]
            record = {"id": f"{kind}-{name}", "image": f"{name}.png", "conversations": turns, "type": kind}
            records[split].append(record)
    for split, found in records.items():
        (folder / f"{split}.json").write_text(json.dumps(found), encoding="utf-8")


def groups_of(file: Path) -> dict[str, str]:
    """Return the group of each icon that is in exactly one of the groups."""
    categories = yaml.safe_load(file.read_text(encoding="utf-8"))
    found: list[tuple[str, str]] = []
    for category, content in categories.items():
        group = category.partition("-")[0]
        found += ((icon, group) for icon in content["icons"] if group in GROUPS)
    times = Counter(icon for icon, _ in found)
    return {icon: group for icon, group in found if times[icon] == 1}


def train(folder: Path, records: Path, steps: int, seed: int, *flags: object) -> None:
    """Train on train.json and images in the folder `records`, or continue; a finished run stays."""
    if (folder / "adapter_config.json").exists():
        return
    data = ("--data_path", records / "train.json", "--image_folder", records / "images")
    own = ("--max_steps", steps, "--save_steps", 25, "--eval_strategy", "no", "--seed", seed, "--output_dir", folder)
    module("milora_vl.train", *flags, *data, *own, "--resume", "auto")


def module(name: str, *words: object) -> str:
    """Run a command of the package; return what it printed."""
    command = [sys.executable, "-m", name, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def measured(folder: Path) -> dict[str, float]:
    """Return the score of a run on the held-out icons, and the KL from the base on text and about drawn shapes."""
    asked = ["--benchmarks", RUNS / "data" / "icons.json", "--data", RUNS / "data" / "images"]
    own = ["--adapter", folder, "--output_dir", folder, "--format", "json"]
    answered = json.loads(module("milora_eval", "run", *asked, "--forgetting_tokens", 0, *own))
    probes = json.loads(module("milora_vl.forgetting", "--on", "text,pictures", *own))
    score = answered["final"]["benchmarks"][0]["metrics"][0]["value"]
    return {"score": round(score, 3), **{name: round(probes[name]["kl"], 4) for name in ("text", "pictures")}}


if __name__ == "__main__":
    main()
