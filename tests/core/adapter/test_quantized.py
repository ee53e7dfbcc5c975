"""Quantised bases (bitsandbytes on a CPU): step 0 equals the quantised base, and what trained comes back."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from milora_vl import apply_milora, calibration_texts, load_adapter, load_model, save_adapter
from milora_vl.models.base import find_base
from milora_vl.train.__main__ import main
from milora_vl.train.launch import load_base_model
from milora_vl.train.settings import Recipe
from support.adapter_cases import LLAVA_POLICY, llava_batch, train_steps
from support.calibrated import directions, leaks
from support.problems import raises_code, raises_problem

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
Q = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tiny_llava, tmp_path: Path) -> Path:
    base, processor = tiny_llava()
    base.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**llava_batch(model)).logits


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_it_starts_at_the_quantised_base_trains_and_comes_back(folder: Path, bits, caplog) -> None:
    base = load_model(folder, quantization=bits)[0]
    kinds = {name: type(module).__name__ for name, module in base.named_modules()}
    assert kinds[Q].startswith("Linear4bit" if bits == "4bit" else "Linear8bit")
    assert kinds["model.multi_modal_projector.linear_1"] == kinds["lm_head"] == "Linear"  # they may train
    before = logits(base)
    assert not torch.equal(before, logits(load_model(folder)[0]))
    model = apply_milora(base, LLAVA_POLICY)
    assert torch.allclose(logits(model), before, atol=1e-6)
    losses = train_steps(model.train(), llava_batch(model))
    assert losses[-1] < losses[0]
    trained = logits(model)
    save_adapter(model, folder / "adapter")
    with caplog.at_level(logging.WARNING):
        loaded = load_adapter(load_model(folder, quantization=bits)[0], folder / "adapter")
    assert "only a clearly different base model" in caplog.text
    assert torch.allclose(logits(loaded), trained, atol=1e-6)
    assert torch.isfinite(logits(load_adapter(load_model(folder)[0], folder / "adapter"))).all()  # the same model


def test_another_base_is_told_from_a_quantised_one(folder: Path, tiny_llava) -> None:
    model = apply_milora(load_model(folder, quantization="4bit")[0], LLAVA_POLICY)
    save_adapter(model, folder / "adapter")
    with raises_code("adapter-wrong-base"):
        load_adapter(tiny_llava(seed=1)[0], folder / "adapter")


def test_a_recipe_says_how_a_base_is_quantised(folder: Path) -> None:
    """As QLoRA and LLaVA do; 4 bits are multiplied in the precision of the run."""
    content = {"model": str(folder), "quantization": "4bit"}
    for train, dtype in (({"bf16": True}, torch.bfloat16), ({}, torch.float32)):
        recipe = Recipe.parse({**content, "train": train})
        model = load_base_model(recipe, find_base(str(folder)), torch.float32, torch.device("cpu"))[0]
        layer = model.get_submodule(Q)
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, dtype)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--deepspeed", "zero3"], "ZeRO-3 cannot shard a quantised base"),
        (["--policy", "[{modules: language, method: full}]"], "14 quantised modules"),
    ],
)
def test_what_a_quantised_base_cannot_do_is_told_before_it_loads(flags: list[str], message: str, folder: Path) -> None:
    words = ["--model", str(folder), "--quantization", "4bit", "--use_cpu", *flags]
    words += [] if "--policy" in flags else ["--rank", "4"]
    with raises_problem(message=message):
        main([*words, "--dry-run"])


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_inputs_of_quantised_layers_are_protected(folder: Path, bits) -> None:
    base = load_model(folder, quantization=bits)[0]
    batches = calibration_texts(base, count=16, length=24)
    rules = [
        {"modules": "language", "method": "milora", "rank": 2, "protect": 0.6},
        {"modules": "language.mlp", "method": "milora", "rank": 2, "protect": 0.6},
    ]
    protected = directions(base, rules, batches)
    model = apply_milora(base, rules, calibration=batches)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
        optimizer.step()
    save_adapter(model, folder / "adapter")
    again = load_adapter(load_model(folder, quantization=bits)[0], folder / "adapter", is_trainable=True)
    assert max(leaks(again, protected)) < 1e-5
