"""The start of a default training: processor seconds of each part until the first step, and what the calibration holds.

python benchmarks/start.py [--models tiny smollm2 smol-llava] [--data data/emoji]
python benchmarks/start.py --base_kl [--records 8]    the price of the term, for a step of smol-llava

`--data` is the folder of `python -m milora_data emoji`; SmolLM2 trains on its questions without pictures. Nothing is
cached: the folder of the cache is temporary. Prints one JSON line with, by model:

    seconds   processor time of loading, and of each part of `milora_vl.core.calibration.PARTS`
    wall      seconds in all, which depend on what else the machine does
    held_out  the mean share over layers of the input energy that the protected directions hold on batches that did not
              choose them: the calibration's own, three books, and held-out records with pictures
    directions  the mean share of the input directions that are protected

The price: the seconds of a step `alone`, `with_texts` and `with_captions`, two of each, the best of three; and `price`,
the mean time of a step with the term in every fourth, as by default, divided by `alone`. All with one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import alternately, clocked
from milora_vl import Policy, apply_milora
from milora_vl.common.cli.screen import Screen
from milora_vl.core.adapter.fixed_a import make_A
from milora_vl.core.calibration import CAPTIONS, FACTORS, INPUTS, TEXTS
from milora_vl.core.calibration.activations import energy_limits, for_each_input, input_rows
from milora_vl.core.calibration.bases import InputBasis
from milora_vl.core.calibration.texts import LENGTH
from milora_vl.core.policy.rules import DEFAULT_RULES, without_projector
from milora_vl.core.policy.towers import image_token_of
from milora_vl.core.weights.matrices import read_matrix
from milora_vl.forgetting.measure import general_text, text_batches
from milora_vl.interop.base_kl import add_base_kl, with_positions
from milora_vl.models.base import find_base, split_processor
from milora_vl.models.losses import add_chunked_loss, summed_loss
from milora_vl.train.data import collator, read_records
from milora_vl.train.launch import load_base_model
from milora_vl.train.settings import BaseKLConfig, Recipe
from milora_vl.train.start import make_texts

NAMES = ("tiny", "smollm2", "smol-llava")


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--base_kl", action="store_true", help="measure the price of the term")
    parser.add_argument("--records", type=int, default=8, help="of a step with the term")
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more threads, processor time contains waiting
    found: dict[str, Any] = {}
    for name in () if options.base_kl else options.models:
        found[name] = start(name, options.data)
        print(name, found[name], file=sys.stderr)
    print(json.dumps(base_kl(options.data, options.records) if options.base_kl else found))


def recipe_of(name: str, data: Path, cache: str, **changes: Any) -> Recipe:
    """Return the recipe of a default training; `tiny` has too few directions for the default rank."""
    rules = [dict(rule) for rule in DEFAULT_RULES]
    if name == "tiny":
        rules = [{**rule, "rank": 4, "alpha": 4} for rule in rules]
    records = {"path": str(data / "train.json"), "image_folder": str(data / "images")}
    if name == "smollm2":
        rules = without_projector(rules)
        text = [row for row in json.loads((data / "train.json").read_text()) if "image" not in row]
        file = Path(cache) / "text.json"
        file.write_text(json.dumps(text))
        records = {"path": str(file)}
    return Recipe.parse({"model": name, "data": records, "policy": rules, "factor_cache": cache, **changes})


def start(name: str, data: Path) -> dict[str, Any]:
    """Return the measurements of one model."""
    seconds: dict[str, float] = {}
    part = partial(clocked, seconds, of_process=True)
    with tempfile.TemporaryDirectory() as cache, clocked(took := {}, "wall"):
        recipe = recipe_of(name, data, cache)
        with part("loading"):
            base = find_base(name)
            model, processor = load_base_model(recipe, base, torch.float32, torch.device("cpu"))
            records = read_records(recipe.data).train
        targets = Policy.parse(recipe.policy).resolve(model)
        without = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"pictures": 0})})
        with part(TEXTS):
            make_texts(without, base, model, processor, records, Screen())
        with part(CAPTIONS):
            texts = make_texts(recipe, base, model, processor, records, Screen())
        with part(INPUTS):
            inputs = for_each_input(model, targets, texts.batches(), lambda _, __, inputs: inputs)
        with part(FACTORS):
            for target in targets:
                make_A(target, read_matrix(model.get_submodule(target.path)), inputs[target.path])
    held = {"calibration": mean(b.held_out or 0.0 for b in inputs.values())}
    tokenizer, pictures = split_processor(processor)
    books = text_batches(general_text(), tokenizer, num_tokens=3072, block_length=192, batch_size=8)
    held["books"] = share(model, inputs, [batch.inputs for batch in books])
    if pictures is not None:
        val = recipe.data.model_copy(update={"path": str(data / "val.json")})
        shown = [record for record in read_records(val).train if record.images][:32]
        held["pictures"] = share(model, inputs, [collator(recipe, base, processor)(shown)])
    return {
        "seconds": {**seconds, "all": round(sum(seconds.values()), 1)},
        **took,
        "held_out": {kind: round(value, 4) for kind, value in held.items()},
        "directions": round(mean(b.V.shape[1] / len(b.V) for b in inputs.values()), 4),
    }


@torch.no_grad()
def share(model: nn.Module, inputs: Mapping[str, InputBasis], batches: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean share over layers of the input energy that the protected directions hold, without padding."""
    sums: dict[str, list[float]] = {path: [0.0, 0.0] for path in inputs}
    handles = []
    mask = torch.zeros(0)

    def hook(path: str, module: nn.Module, x: Tensor) -> None:
        rows = input_rows(module, x)
        rows = rows[mask] if len(rows) == len(mask) else rows  # a projector's rows are pictures
        rows = rows * energy_limits(rows).sqrt()[:, None]
        sums[path][0] += float((rows @ inputs[path].V).square().sum())
        sums[path][1] += float(rows.square().sum())

    for path in inputs:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda module, args, path=path: hook(path, module, args[0])))
    for batch in batches:
        mask = batch["attention_mask"].reshape(-1).bool()
        model(**{key: value for key, value in batch.items() if key != "labels"})
    for handle in handles:
        handle.remove()
    return mean(inside / total for inside, total in sums.values() if total)  # text alone leaves the projector out


def base_kl(data: Path, records: int) -> dict[str, Any]:
    """Return the seconds of a step of smol-llava, without the term and with it."""
    term = BaseKLConfig()
    with tempfile.TemporaryDirectory() as cache:
        recipe = recipe_of("smol-llava", data, cache, calibration={"samples": 0, "pictures": term.texts})
        base = find_base("smol-llava")
        model, processor = load_base_model(recipe, base, torch.float32, torch.device("cpu"))
        found = [record for record in read_records(recipe.data).train if record.images][:records]
        batch = collator(recipe, base, processor)(found)
        (captions,) = make_texts(recipe, base, model, processor, found, Screen(), 100).batches()
    ids = torch.randint(1000, 40_000, (term.texts, LENGTH), generator=torch.Generator().manual_seed(0))
    picture = image_token_of(model)
    texts = with_positions({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, picture)
    captions = with_positions(captions, picture)
    # A LoRA costs what the default does (docs/performance.md) and needs no calibration.
    rules = [{**rule, "method": "lora"} for rule in DEFAULT_RULES]
    tuned = apply_milora(model, Policy.parse(rules))
    add_chunked_loss(model)
    add_base_kl(tuned)
    inputs = {name: value for name, value in batch.items() if name != "counts"}

    def step(term_batch: Mapping[str, Tensor] | None) -> None:
        outputs: list[Mapping[str, Any]] = []

        def forward(**arguments: Any) -> Mapping[str, Any]:
            outputs.append(tuned(**arguments, **({} if term_batch is None else {"base_kl": term_batch})))
            return outputs[0]

        loss, _ = summed_loss(forward, inputs, chunked=True)
        (loss if term_batch is None else loss + outputs[0]["base_kl"]).backward()
        tuned.zero_grad()

    steps = {"alone": lambda: step(None), "with_texts": lambda: step(texts), "with_captions": lambda: step(captions)}
    seconds = {name: round(min(taken), 2) for name, taken in alternately(steps, 3, of_process=True).items()}
    added = (seconds["with_texts"] + seconds["with_captions"]) / 2 - seconds["alone"]
    return {"records": records, **seconds, "price": round(1 + added / seconds["alone"] / term.every, 3)}


if __name__ == "__main__":
    main()
