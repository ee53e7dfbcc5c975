"""What works with every family that transformers registers for pictures and text: docs/families.csv.

    python tests/support/family_table.py [--only NAME ...] [--seconds 300]

Each family runs in its own process, on a tiny random model (`support.any_family`), with a time limit. The results
go to tests/reference/families.json, and the page is made of that file. A column has "yes", or the reason why not.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import select
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from milora_vl.train.join_settings import PolicyEdits, edited
from milora_vl.train.plan import _check_pictures
from milora_vl.train.settings import DataConfig, Recipe

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from milora_data.records.record import Turn  # noqa: E402
from milora_eval import run as evaluate  # noqa: E402
from milora_vl import Policy, apply_milora, collator_for, load_adapter, merge, save_adapter  # noqa: E402
from milora_vl.common.errors import UserError  # noqa: E402
from milora_vl.core.policy.rules import Target, without_projector  # noqa: E402
from milora_vl.core.policy.towers import find_towers  # noqa: E402
from milora_vl.models.base import Base  # noqa: E402
from milora_vl.models.generate import Prompt, generate  # noqa: E402
from support import any_family, official_data  # noqa: E402
from support.vlm_runs import record, write_pictures  # noqa: E402

PAGE, RESULTS = ROOT / "docs" / "families.csv", ROOT / "tests" / "reference" / "families.json"
COLUMNS = ("adapter", "train", "chat", "evaluate", "pack")
FAMILIES: tuple[str, ...] = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
ASKED = record([("human", "<image>\nWhat is it?"), ("gpt", "A cat.")], ["0.png"])
Result = dict[str, str]


def check(family: str, folder: Path) -> Result:
    """Return what works with one family: for each column "yes", or the reason why not."""
    try:
        config, processor = any_family.tiny_family(family)
        any_family.tiny_model(config)
    except Exception as error:
        return dict.fromkeys(COLUMNS, f"no tiny model: {_phrase(error)}")
    pictures = write_pictures(folder / "pictures")
    official_data.write(folder / "benchmarks", "pope")
    made: dict[str, Any] = {}

    def train() -> None:
        collate = collator_for(any_family.tiny_model(config), processor, image_folder=pictures)
        made["batch"] = collate([ASKED])
        model = _adapted(any_family.tiny_model(config))
        first = _step(model, made["batch"])
        assert model(**made["batch"]).loss != first, "the loss is the same after a step"

    def adapter() -> None:
        batch = made.get("batch") or _plain_batch(processor, pictures / "0.png") or _text_batch(config)
        _check_adapter(config, batch, folder / "adapter")

    def chat() -> None:
        prompt = Prompt((Turn("user", "<image>\nWhat is it?"),), (pictures / "0.png",))
        assert len(generate(any_family.tiny_model(config), processor, [prompt], max_new_tokens=3)) == 1

    def scored() -> None:
        model = any_family.tiny_model(config)
        results = evaluate(
            model, processor, ["pope"], data_dir=folder / "benchmarks", output_dir=folder / "run", limit=1
        )
        assert results["benchmarks"]

    result = {"train": _tried(train)}
    if processor is None:
        result["train"] = "transformers registers no processor for it"
    else:
        result |= {"chat": _tried(chat), "evaluate": _tried(scored)}
    result["adapter"] = _tried(adapter)
    if result["train"] == "yes":
        result["pack"] = packs(config)
    return {column: result.get(column, result["train"]) for column in COLUMNS}


def packs(config: Any) -> str:
    """Return "yes", or the reason why the plan refuses packed records."""
    return _tried(lambda: _require_packable(config))


def _require_packable(config: Any) -> None:
    """Raise UserError with the plan's reason if it refuses packed records of this model."""
    base = Base.of(config.model_type, config)
    ratio = "pad" if base.tiling is None else "anyres"
    data = DataConfig(packing=True, image_aspect_ratio=ratio)
    recipe = Recipe(template="chat_template" if base.own_pictures else "vicuna_v1", data=data)
    _check_pictures(recipe, base, [])


def _tried(action: Callable[[], None]) -> str:
    try:
        action()
    except Exception as error:
        return _phrase(error)
    return "yes"


def _phrase(error: Exception) -> str:
    """Return an error as a phrase: our message, or another library's with its kind."""
    text = error.first.message if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:157] + "..."


def _rules(model: Any) -> list[dict[str, Any]]:
    """Return rules for a model: MiLoRA of rank 2, without protected inputs, and the projector in full."""
    rules = edited(None, PolicyEdits(method="milora", rank=2, protect=0))
    rules = [{key: value for key, value in rule.items() if key != "dropout"} for rule in rules]
    full = {"modules": "projector", "method": "full"}  # some families have no linear layer there
    return without_projector(rules) + ([full] if find_towers(model).projector else [])


def targets_of(model: Any) -> list[Target]:
    """Return the targets of `_rules`."""
    return Policy.parse(_rules(model)).resolve(model)


def _adapted(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experts as 3-D weights
        return apply_milora(model, _rules(model))


def _step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Make one step of AdamW, in eval mode, and return the loss before it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(**batch).loss
    loss.backward()
    torch.optim.AdamW(trained, lr=0.02).step()
    return loss.detach()


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model.eval()(**batch).logits


def _plain_batch(processor: Any, picture: Path) -> dict[str, Any] | None:
    """Return what a processor makes of a picture and a text without a template; None if it refuses them."""
    try:
        batch = dict(processor(images=Image.open(picture), text="a cat", return_tensors="pt"))
    except Exception:
        return None
    return batch | {"labels": batch.get("labels", batch["input_ids"])} if "input_ids" in batch else None


def _text_batch(config: Any) -> dict[str, Any]:
    """Return a row of random text tokens, for a family without a processor."""
    ids = torch.randint(3, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _check_adapter(config: Any, batch: dict[str, Any], folder: Path) -> None:
    """Check step 0, a step, saving and loading, and merging."""
    base = any_family.tiny_model(config)
    expected = _logits(base, batch)
    assert torch.isfinite(expected).all(), "the tiny model has no finite logits"
    model = _adapted(base)
    towers = {target.tower for target in model.milora_targets}
    assert "language" in towers, "no language tower"
    assert torch.equal(_logits(model, batch), expected), "step 0 differs from the base"
    before = _step(model, batch)
    trained = _logits(model, batch)
    assert model(**batch).loss != before, "the loss is the same after a step"
    save_adapter(model, folder)
    reloaded = load_adapter(any_family.tiny_model(config), folder)
    for how, logits in {"reloaded": _logits(reloaded, batch), "merged": _logits(merge(model), batch)}.items():
        assert torch.allclose(logits, trained, atol=1e-4), (
            f"{how} logits differ by {(logits - trained).abs().max():.1e}"
        )


def run_alone(family: str, seconds: int) -> Result:
    """Return the result of `check` from its own process, which ends after so many seconds."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(seconds + 5)
        warnings.simplefilter("ignore")
        with tempfile.TemporaryDirectory() as folder:
            result = check(family, Path(folder))
        os.write(there, json.dumps(result).encode())
        os._exit(0)
    os.close(there)
    ready, _, _ = select.select([here], [], [], seconds)
    text = b"".join(iter(lambda: os.read(here, 65536), b"")) if ready else b""
    os.close(here)
    if not text:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if text:
        return dict(json.loads(text))
    return dict.fromkeys(COLUMNS, "the process died" if ready else f"not done after {seconds} s")


def rows_of(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of docs/families.csv: a family, and "yes" or the reason why not for each column."""
    families: dict[str, Result] = results["families"]
    return [("family", *COLUMNS), *((name, *(row[column] for column in COLUMNS)) for name, row in families.items())]


def main(words: list[str] | None = None) -> None:
    """Check families, and write results and the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, help="Families to check again; others keep their rows.")
    parser.add_argument("--seconds", type=int, default=300, help="Time limit for each family.")
    parser.add_argument("--pack", action="store_true", help="Ask the plan again about packing, and check nothing else.")
    options = parser.parse_args(words)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    known: dict[str, Result] = json.loads(RESULTS.read_text())["families"] if options.only or options.pack else {}
    for family in options.only or FAMILIES:
        if not options.pack:
            known[family] = run_alone(family, options.seconds)
        elif known[family]["train"] == "yes":
            known[family]["pack"] = packs(any_family.tiny_family(family)[0])
        else:
            known[family]["pack"] = known[family]["train"]
        print(family, {column: known[family][column][:100] for column in COLUMNS}, flush=True)
        write(known)


def write(known: dict[str, Result]) -> None:
    """Write the results and the CSV file, in the order of transformers."""
    results = {
        "transformers": transformers.__version__,
        "families": {name: known[name] for name in FAMILIES if name in known},
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    with PAGE.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened, lineterminator="\n").writerows(rows_of(results))


if __name__ == "__main__":
    main()
