"""What must not change: commands, flags, keys, imports, ids and masks, and runs that older versions have made."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from milora_vl import load_model
from milora_vl.train import main as train
from support.drawn import write_tiny_data
from support.launched import launched, needs_deepspeed

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
sys.path.insert(0, str(REFERENCE))
import make_golden  # noqa: E402
import make_manifest  # noqa: E402

MANIFEST: dict[str, Any] = json.loads((REFERENCE / "manifest.json").read_text(encoding="utf-8"))
GOLDEN: dict[str, Any] = json.loads((REFERENCE / "golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", MANIFEST["flags"])
def test_no_flag_is_gone(command: str) -> None:
    assert set(MANIFEST["flags"][command]) - set(make_manifest.flags(command)) == set()


def test_no_key_of_recipes_and_rules_is_gone() -> None:
    now = make_manifest.manifest_of_keys()
    for kind in ("recipe_keys", "rule_keys"):
        assert set(MANIFEST[kind]) - set(now[kind]) == set()


@pytest.mark.parametrize("name", MANIFEST["imports"])
def test_documented_imports_work(name: str) -> None:
    module, _, attribute = name.partition(":")
    assert getattr(importlib.import_module(module), attribute) is not None


def test_ids_and_masks_are_those_of_before() -> None:
    assert make_golden.encoded() == GOLDEN["encoded"]


def test_batches_are_those_of_before() -> None:
    assert make_golden.batches() == GOLDEN["batches"]


# Made by the first version with `--model tiny` and `--model tiny-text`: six steps, a checkpoint after three.
OLD_RUNS = REFERENCE / "old_runs"
RECORDS = [
    *(
        {
            "id": f"p{i}",
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat colour is it?"},
                {"from": "gpt", "value": ["red", "green", "blue", "white"][i % 4]},
            ],
        }
        for i in range(8)
    ),
    *(
        {
            "id": f"t{i}",
            "conversations": [
                {"from": "human", "value": f"How much is {i} and {i}?"},
                {"from": "gpt", "value": f"It is {2 * i}."},
            ],
        }
        for i in range(4)
    ),
]


def _place(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of an old run, with its data where its recipe names it; the working directory is the folder of both."""
    write_tiny_data(folder / "data", RECORDS)
    texts = [record for record in RECORDS if "image" not in record]
    (folder / "data" / "text.json").write_text(json.dumps(texts), encoding="utf-8")
    shutil.copytree(OLD_RUNS / name, folder / name)
    monkeypatch.chdir(folder)
    return folder / name


def _losses(run: Path) -> list[float]:
    log = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize("name", ["llava", "text"])
def test_an_old_run_resumes_with_the_losses_it_had(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _place(name, tmp_path, monkeypatch)
    expected = _losses(run)
    assert len(expected) == 6
    for file in ("adapter_model.safetensors", "trainer_state.json"):  # as if it had been killed after the checkpoint
        (run / file).unlink()
    command = json.loads((run / "environment.json").read_text(encoding="utf-8"))["command"]
    assert train([*command[3:], "--resume_from_checkpoint", "true"]) == 0
    assert _losses(run) == pytest.approx(expected, rel=1e-5)


# The first version's losses with --bf16, whose adapters multiplied rounded halves.
BF16_LOSSES = [5.553332328796387, 5.5448102951049805, 5.5372314453125, 5.531213283538818, 5.526511192321777, 5.52325]


def test_losses_in_bfloat16_are_those_of_before_up_to_its_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _place("text", tmp_path, monkeypatch)
    command = json.loads((run / "environment.json").read_text(encoding="utf-8"))["command"][3:]
    command[command.index("--output_dir") + 1] = "bf16"
    assert train([*command, "--bf16", "--save_strategy", "no"]) == 0
    assert _losses(tmp_path / "bf16") == pytest.approx(BF16_LOSSES, rel=2e-4)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_an_old_run_of_deepspeed_resumes_from_its_shards(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimizer holds A and B in shards; adapter format version 1."""
    run = _place(name, tmp_path, monkeypatch)
    expected = _losses(run)
    assert len(expected) == 6
    for file in ("adapter_model.safetensors", "trainer_state.json"):
        (run / file).unlink()
    command = json.loads((run / "environment.json").read_text(encoding="utf-8"))["command"]
    done = launched([*command[1:], "--resume_from_checkpoint", "true"], tmp_path)
    assert done.returncode == 0
    assert _losses(run) == pytest.approx(expected, rel=1e-5)
    assert json.loads((run / "milora.json").read_text(encoding="utf-8"))["format_version"] == 2


@pytest.mark.parametrize("name", ["llava", "text"])
def test_the_adapter_of_an_old_run_gives_the_outputs_of_stock_peft(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _place(name, tmp_path, monkeypatch)
    model, processor = load_model("tiny" if name == "llava" else "tiny-text", adapter=run)
    tokenizer = processor.tokenizer if name == "llava" else processor
    ids = torch.tensor([tokenizer("How much is 2 and 2?").input_ids])
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        stock = PeftModel.from_pretrained(load_model("tiny" if name == "llava" else "tiny-text")[0], str(run))
        expected = stock(input_ids=ids).logits
    assert not torch.equal(tuned, base)
    torch.testing.assert_close(tuned, expected, atol=1e-6, rtol=0)
