"""The price of `base_kl`: processor seconds of a training step of smol-llava, without the term and with it.

python benchmarks/base_kl.py [--records 8] [--data data/emoji]

`--data` is the folder of `python -m milora_data emoji`. Prints one JSON line: the seconds of a step `alone`,
`with_texts` and `with_captions`, two of each; and `price`, the mean time of a step with the term in every fourth, as by
default, divided by `alone`. One thread; the best of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milora_vl import Policy, apply_milora
from milora_vl.core.calibration.texts import LENGTH
from milora_vl.core.policy.rules import DEFAULT_RULES
from milora_vl.models.base import find_base
from milora_vl.models.losses import add_chunked_loss, summed_loss
from milora_vl.train import calibration_batches, collators
from milora_vl.train import model as models
from milora_vl.train.base_kl import add_base_kl
from milora_vl.train.data import read_records
from milora_vl.train.recipe import BaseKLConfig, Recipe
from milora_vl.train.screen import Screen

Batch = Mapping[str, Tensor]


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more threads, processor time contains waiting
    term = BaseKLConfig()
    with tempfile.TemporaryDirectory() as cache:
        records = {"path": str(options.data / "train.json"), "image_folder": str(options.data / "images")}
        calibration = {"samples": 0, "pictures": term.texts}
        recipe = Recipe.parse(
            {"model": "smol-llava", "data": records, "calibration": calibration, "factor_cache": cache}
        )
        base = find_base("smol-llava")
        model, processor = models.load_base(recipe, base, torch.float32, torch.device("cpu"))
        found = [record for record in read_records(recipe.data).train if record.images][: options.records]
        batch = collators.collator(recipe, base, processor)(found)
        (captions,) = calibration_batches.make_texts(recipe, base, model, processor, found, Screen(), 100).batches()
    ids = torch.randint(1000, 40_000, (term.texts, LENGTH), generator=torch.Generator().manual_seed(0))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # A LoRA costs what the default does (docs/performance.md) and needs no calibration.
    rules = [{**rule, "method": "lora"} if rule["method"] == "gradient" else rule for rule in DEFAULT_RULES]
    tuned = apply_milora(model, Policy.parse(rules))
    add_chunked_loss(model)
    add_base_kl(tuned)
    alone, text, caption = (
        seconds(tuned, batch, term_batch, options.repeats) for term_batch in (None, texts, captions)
    )
    price = 1 + ((text + caption) / 2 - alone) / alone / term.every
    result = {"records": options.records, "alone": alone, "with_texts": text, "with_captions": caption}
    print(json.dumps({"benchmark": "base_kl", **result, "price": round(price, 3)}))


def seconds(model: Any, batch: Batch, texts: Batch | None, repeats: int) -> float:
    """Return the processor seconds of a forward and a backward, the best of so many."""
    inputs = {name: value for name, value in batch.items() if name != "counts"}
    found = []
    for _ in range(repeats):
        start = time.process_time()
        outputs: list[Mapping[str, Any]] = []

        def forward(outputs: list[Mapping[str, Any]] = outputs, **arguments: Any) -> Mapping[str, Any]:
            outputs.append(model(**arguments, **({} if texts is None else {"base_kl": texts})))
            return outputs[0]

        loss, _ = summed_loss(forward, inputs, chunked=True)
        (loss if texts is None else loss + outputs[0]["base_kl"]).backward()
        found.append(time.process_time() - start)
        model.zero_grad()
    return round(min(found), 2)


if __name__ == "__main__":
    main()
