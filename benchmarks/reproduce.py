"""The cost of the trainings in docs/reproduce.md: the `--dry-run` of every training command, with generated records.

python benchmarks/reproduce.py          prints one JSON line
python benchmarks/reproduce.py --docs   also writes benchmarks/reproduce.json and the table of the page

The sizes of the sets come from their cards. The lengths of the records are assumed, because the sets are not available
here. All methods that train a part of the spectrum cost the same, so only one of them is planned.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from milora_vl import train
from milora_vl.recipe import command_line
from milora_vl.recipe.merge import merge_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "reproduce.md", Path(__file__).with_name("reproduce.json")
BEGIN, END = "<!-- written by benchmarks/reproduce.py --docs -->", "<!-- end -->"
COMMAND = re.compile(r"^(?:torchrun --nproc_per_node (\d+)|python) -m milora_vl\.train (.+)$", re.MULTILINE)
SECONDS = {"s": 1, "min": 60, "h": 3600, "days": 86400}
PROJECTOR = Path("checkpoints/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5/mm_projector.bin")


@dataclass(frozen=True, slots=True)
class DataSet:
    """One training set: its number of records, and the length of a generated record in characters."""

    records: int
    question: int
    answer: int
    picture: bool = False


SETS = {
    "llava_v1_5_mix665k.json": DataSet(665_298, 120, 180, picture=True),
    "data/commonsense/data.json": DataSet(170_300, 200, 30),
    "data/metamath/data.json": DataSet(395_000, 240, 600),
    "data/ultrafeedback/data.json": DataSet(61_135, 800, 1600),
}


def commands() -> list[tuple[int, list[str]]]:
    """Return devices and flags of every training command of the page, in order."""
    return [(int(devices or 1), flags.split()) for devices, flags in COMMAND.findall(PAGE.read_text(encoding="utf-8"))]


def run_of(flags: list[str]) -> str:
    """Return the name of the run of a command."""
    return Path(flags[flags.index("--output_dir") + 1]).name


def write_data(folder: Path) -> None:
    """Write a few records for every set, and the other files of the recipes, to the paths in the recipes."""
    from PIL import Image

    pictures = folder / "playground" / "data"
    pictures.mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(pictures / "a.jpg")
    (folder / PROJECTOR).parent.mkdir(parents=True)
    (folder / PROJECTOR).touch()
    for name, made in SETS.items():
        turns = [
            {"from": "human", "value": ("<image>\n" if made.picture else "") + "a " * (made.question // 2)},
            {"from": "gpt", "value": "b " * (made.answer // 2)},
        ]
        value = {"id": "0", **({"image": "a.jpg"} if made.picture else {}), "conversations": turns}
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (path, path.with_name("eval.json")):
            file.write_text(json.dumps([value] * 16), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Cost:
    """The plan of one command."""

    run: str
    trained: int
    share: float  # trainable share of all parameters, in percent
    devices: int
    batch: int
    tokens: int  # of a record
    steps: int
    gib: float  # a device
    step_seconds: float
    hours: float


def cost(devices: int, flags: list[str], folder: Path) -> Cost:
    """Return the plan of one command, run in a folder with the data."""
    text, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(text):
            train.main([*flags, "--dry-run", "--devices", str(devices)])
    finally:
        os.chdir(before)
    plan = text.getvalue()
    recipe = merge_recipe(command_line.parse(flags)).recipe
    records = min(SETS[str(recipe.data.path)].records, recipe.data.limit or math.inf)
    batch = int(_found(r"^batch .* = (\d+)$", plan))
    steps = math.ceil(records / batch) * int(recipe.train["num_train_epochs"])
    seconds, unit = re.findall(r"about ([\d.e-]+) (\w+) a step on one A100", plan)[0]
    step_seconds = float(seconds) * SECONDS[unit]
    return Cost(
        run=run_of(flags),
        trained=int(_found(r"trainable params: ([\d,]+)", plan)),
        share=float(_found(r"trainable%: ([\d.]+)", plan)),
        devices=devices,
        batch=batch,
        tokens=int(_found(r"~([\d,]+) tokens a record", plan)),
        steps=steps,
        gib=float(_found(r"memory about ([\d.]+) GiB", plan)),
        step_seconds=step_seconds,
        hours=round(steps * step_seconds / 3600, 1),
    )


def _found(pattern: str, text: str) -> str:
    return re.findall(pattern, text, re.MULTILINE)[0].replace(",", "")


def table(costs: list[Cost]) -> str:
    """Return the costs as markdown."""
    rows = [
        "| run | trained parameters | of all | devices | records a step | tokens each | steps | GiB a device | hours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in costs:
        counts = f"`{one.run}` | {one.trained:,} | {one.share:.2f} % | {one.devices} | {one.batch} | {one.tokens}"
        rows.append(f"| {counts} | {one.steps:,} | {one.gib:.1f} | {one.hours:.1f} |")
    return "\n".join(rows)


def main() -> None:
    """Plan every command of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="also write the results and the table of the page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        planned: dict[str, Cost] = {}
        costs = []
        for devices, flags in commands():
            words = re.sub(r" --method (pissa|random)| --output_dir \S+", "", " ".join(flags))
            planned[words] = planned.get(words) or cost(devices, flags, Path(folder))
            costs.append(replace(planned[words], run=run_of(flags)))
            sys.stderr.write(f"{costs[-1]}\n")
    content = [asdict(one) for one in costs]
    print(json.dumps(content))
    if options.docs:
        RESULTS.write_text("[\n" + ",\n".join(map(json.dumps, content)) + "\n]\n", encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table(costs)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
