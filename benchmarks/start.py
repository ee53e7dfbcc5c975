"""The start of a default training: processor seconds of each part until the first step, and what the calibration holds.

python benchmarks/start.py [--models tiny smollm2 smol-llava] [--data data/emoji]

`--data` is the folder of `python -m milora_data emoji`; SmolLM2 trains on its questions without pictures. Prints one
JSON line with, by model:

    seconds   processor time of loading, each part of `milora_vl.core.calibration.PARTS`, and the choice of A
    wall      seconds in all, which depend on what else the machine does
    held_out  the mean share over layers of the input energy that the protected directions hold on batches that did not
              choose them: the calibration's own, three books, and held-out records with pictures
    directions  the mean share of the input directions that are protected

Nothing is cached: the folder of the cache is temporary.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from milora_vl.core.calibration import CAPTIONS, GRADIENT, INPUTS, PARTS, TEXTS
from milora_vl.core.calibration.activations import energy_limits, find_inputs, input_rows
from milora_vl.core.calibration.bases import ProtectedInputs
from milora_vl.core.calibration.gradients import gradient_sketches
from milora_vl.core.policy import Policy
from milora_vl.core.policy.rules import DEFAULT_RULES, without_projector
from milora_vl.forgetting.text import general_text, text_batches
from milora_vl.models.base import find_base
from milora_vl.models.loading import split_processor
from milora_vl.train import calibration_batches, collators
from milora_vl.train import model as models
from milora_vl.train.data import read_records
from milora_vl.train.recipe import Recipe
from milora_vl.train.screen import Screen

NAMES = ("tiny", "smollm2", "smol-llava")


class Clock:
    """Processor seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the processor time of the block."""
        start = time.process_time()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.process_time() - start, 1)


def recipe_of(name: str, data: Path, cache: str) -> Recipe:
    """Return the recipe of a default training; `tiny` has too few directions for the default rank."""
    rules = [dict(rule) for rule in DEFAULT_RULES]
    if name == "tiny":
        rules[0] |= {"rank": 4, "alpha": 4}
    records = {"path": str(data / "train.json"), "image_folder": str(data / "images")}
    if name == "smollm2":
        rules = without_projector(rules)
        text = [row for row in json.loads((data / "train.json").read_text()) if "image" not in row]
        file = Path(cache) / "text.json"
        file.write_text(json.dumps(text))
        records = {"path": str(file)}
    return Recipe.parse({"model": name, "data": records, "policy": rules, "factor_cache": cache})


def measure(name: str, data: Path) -> dict[str, Any]:
    """Return the measurements of one model."""
    clock, began = Clock(), time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        recipe = recipe_of(name, data, cache)
        with clock.part("loading"):
            base = find_base(name)
            model, processor = models.load_base(recipe, base, torch.float32, torch.device("cpu"))
            records = read_records(recipe.data).train
        targets = Policy.parse(recipe.policy).resolve(model)
        without = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"pictures": 0})})
        with clock.part(TEXTS):
            texts = calibration_batches.make_texts(without, base, model, processor, records, Screen())
        with clock.part(CAPTIONS):
            texts = calibration_batches.make_texts(recipe, base, model, processor, records, Screen())
        with clock.part(INPUTS):
            inputs = find_inputs(model, targets, texts.batches())
        with clock.part(GRADIENT):
            task = calibration_batches.task_batches(recipe, base, processor, targets, records, 100) or []
            gradient_sketches(model, [t for t in targets if t.method == "gradient"], task)
        wall = time.perf_counter() - began
        held = {"calibration": mean(b.held_out or 0.0 for b in map(inputs.of, inputs.numbers))}
        tokenizer, pictures = split_processor(processor)
        books = text_batches(general_text(), tokenizer, num_tokens=3072, block_length=192, batch_size=8)
        held["books"] = share(model, inputs, [batch.inputs for batch in books])
        if pictures is not None:
            val = recipe.data.model_copy(update={"path": str(data / "val.json")})
            shown = [record for record in read_records(val).train if record.images][:32]
            held["pictures"] = share(model, inputs, [collators.collator(recipe, base, processor)(shown)])
    parts = {part: clock.seconds[part] for part in ("loading", *PARTS)}
    return {
        "seconds": {**parts, "all": round(sum(parts.values()), 1)},
        "wall": round(wall, 1),
        "held_out": {kind: round(value, 4) for kind, value in held.items()},
        "directions": round(mean(b.num_directions / b.size for b in map(inputs.of, inputs.numbers)), 4),
    }  # fmt: skip


@torch.no_grad()
def share(model: nn.Module, inputs: ProtectedInputs, batches: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean share over layers of the input energy that the protected directions hold, without padding."""
    sums: dict[str, list[float]] = {path: [0.0, 0.0] for path in inputs.numbers}
    handles = []
    mask = torch.zeros(0)

    def hook(path: str, module: nn.Module, x: Tensor) -> None:
        rows = input_rows(module, x)[mask]
        rows = rows * energy_limits(rows).sqrt()[:, None]
        sums[path][0] += float((rows @ inputs.of(path).V).square().sum())
        sums[path][1] += float(rows.square().sum())

    for path in inputs.numbers:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda module, args, path=path: hook(path, module, args[0])))
    for batch in batches:
        mask = batch["attention_mask"].reshape(-1).bool()
        model(**{key: value for key, value in batch.items() if key != "labels"})
    for handle in handles:
        handle.remove()
    return mean(inside / total for inside, total in sums.values())


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more threads, processor time contains waiting
    found = {}
    for name in options.models:
        found[name] = measure(name, options.data)
        print(name, found[name], file=sys.stderr)
    print(json.dumps({"benchmark": "start", **found}))


if __name__ == "__main__":
    main()
