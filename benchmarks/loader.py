"""Records per second of 2 loader processes and of smol-llava's training, measured separately; the share of the tower.

python benchmarks/loader.py [--steps 6] [--batches 40]    prints a JSON line; the ratios are measured in one run
Pictures are JPEGs of 640 x 480, conversations as in the parts of mix665k, batches of 8 as in the demo's recipe.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader

from data import photo, records
from milora_data.batches.collate import ImageTextCollator
from milora_data.records.record import parse_record
from milora_vl import Policy, apply_milora, load_model
from milora_vl.models import loading
from milora_vl.models.image_tokens import image_token_id, image_tokens
from milora_vl.models.losses import add_chunked_loss, summed_loss
from milora_vl.train.features import replay

PICTURES = 64
POLICY = [
    {"modules": "language", "method": "milora", "rank": 32, "alpha": 32},
    {"modules": "projector", "method": "full"},
]


def main() -> None:
    """Measure and print the figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--batches", type=int, default=40)
    options.add_argument("--batch_size", type=int, default=8)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(Path(folder), chosen.steps, chosen.batches, chosen.batch_size)))


def measured(folder: Path, steps: int, batches: int, batch_size: int) -> dict[str, Any]:
    """Return records per second of both, their ratio, and the seconds of a step with and without the tower."""
    for number in range(PICTURES):
        photo(640, 480, folder / f"{number}.jpg")
    made = [value for kind in ("VQA", "captions", "conversations") for value in records(kind, 64)]
    items = [parse_record({**value, "image": f"{number % PICTURES}.jpg"}) for number, value in enumerate(made)]
    base: Any
    base, processor = load_model("smol-llava", dtype=torch.bfloat16)
    tokenizer, image_processor = loading.split_processor(processor)
    tokens = image_tokens(base.config)
    collator = ImageTextCollator(
        tokenizer,
        image_processor,
        image_tokens=tokens,
        image_token_id=image_token_id(base.config),
        image_folder=folder,
        max_length=512,
    )
    # The processes start before the time measurement.
    loader = iter(DataLoader(list(islice(cycle(items), (batches + 4) * batch_size)), batch_size, num_workers=2,
                             collate_fn=collator))  # fmt: skip
    given = [next(loader) for _ in range(4)]
    start = time.perf_counter()
    count = sum(1 for _ in loader)
    fed = count * batch_size / (time.perf_counter() - start)

    assert add_chunked_loss(base)
    model: Any = apply_milora(base, Policy.parse(POLICY)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    whole = per_step(model, optimizer, given, steps)
    tower = base.model.vision_tower
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = [tower(batch["pixel_values"].to(base.dtype)).hidden_states[-1][:, None] for batch in given]
    replay(tower, [base.config.vision_feature_layer])
    cached = [{**batch, "pixel_values": made} for batch, made in zip(given, features, strict=True)]
    without = per_step(model, optimizer, cached, steps)
    return {
        "loader_records_per_second": fed,
        "training_records_per_second": batch_size / whole,
        "ratio": fed * whole / batch_size,
        "step_seconds": whole,
        "step_seconds_with_features": without,
        "share_of_the_tower": 1 - without / whole,
        "threads": torch.get_num_threads(),
    }


def per_step(model: Any, optimizer: Any, batches: list[dict[str, Any]], steps: int) -> float:
    """Return the median seconds of a training step over `batches` in turn."""

    def step(batch: dict[str, Any]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss, count = summed_loss(model, batch, chunked=True)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    times = [timed(lambda batch=batch: step(batch)) for batch in islice(cycle(batches), steps)]
    return median(times)


def timed(function: Callable[[], None]) -> float:
    """Return the seconds that `function` takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
