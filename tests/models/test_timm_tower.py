"""A LLaVA with a timm tower: in training, in transformers' Auto classes, and with its code beside it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from milora_vl import apply_milora, compose, load_model, save_adapter
from milora_vl.export import export
from milora_vl.models.timm_tower import TimmTower, TimmTowerConfig
from support.adapter_cases import move
from support.programs import run as run_program

POLICY = (
    "[{modules: language, method: milora, protect: 0, rank: 2}, "
    "{modules: projector, method: full, learning_rate: 1.0e-3}]"
)
INPUTS = {"input_ids": [[5, *[260] * 100, 9, 7]]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A composed base with a timm tower, an adapter on it, and the logits of both together."""
    root = tmp_path_factory.mktemp("timm")
    words = ["--vision", "timm/test_vit", "--vision_weights", "random", "--language", "tiny-text"]
    compose.main([*words, "--output_dir", str(root / "base")])
    model = apply_milora(load_model(root / "base")[0], POLICY)
    move(model)
    save_adapter(model, root / "adapter")
    save_file({"pixels": torch.randn(1, 3, 160, 160)}, root / "pixels.safetensors")
    return SimpleNamespace(root=root, logits=logits(model.eval(), root))


@torch.no_grad()
def logits(model: torch.nn.Module, root: Path) -> torch.Tensor:
    return model(
        input_ids=torch.tensor(INPUTS["input_ids"]), pixel_values=load_file(root / "pixels.safetensors")["pixels"]
    ).logits


# Saves the logits of a merged model, in a process in which nothing is registered yet.
LOAD = """
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForMultimodalLM, AutoProcessor
from transformers import AutoModelForImageTextToText

from milora_vl.models.timm_tower import register

folder, root = sys.argv[1:]
register()
assert type(AutoConfig.from_pretrained(folder).vision_config).__name__ == "TimmTowerConfig"
assert AutoProcessor.from_pretrained(folder).tokenizer
assert AutoImageProcessor.from_pretrained(folder).do_pad
model = AutoModelForImageTextToText.from_pretrained(folder)
assert type(AutoModelForMultimodalLM.from_pretrained(folder)) is type(model)  # as `transformers serve` does
pixels = load_file(root + "/pixels.safetensors")["pixels"]
with torch.no_grad():
    found = model(input_ids=torch.tensor({ids}), pixel_values=pixels).logits
save_file({{"logits": found}}, root + "/found.safetensors")
"""


def test_a_merged_model_loads_after_the_tower_is_registered(made: SimpleNamespace, tmp_path: Path) -> None:
    done = export(made.root / "adapter", "merged", tmp_path / "merged")
    assert done.loads_with == "milora_vl"
    assert not list((tmp_path / "merged").glob("*.py"))
    code = LOAD.format(ids=INPUTS["input_ids"])
    ran = run_program(["-c", code, str(tmp_path / "merged"), str(made.root)], cwd=made.root)
    assert ran.returncode == 0, ran.stderr
    found = load_file(made.root / "found.safetensors")["logits"]
    torch.testing.assert_close(found, made.logits, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def tower() -> Any:
    return TimmTower(TimmTowerConfig.of("tf_efficientnet_lite0", image_size=64, grid=2, levels=(2, 3))).eval()


def test_a_frozen_tower_keeps_its_batch_statistics_in_training(tower: Any) -> None:
    tower.requires_grad_(False).train()
    before = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    tower(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(buffer, before[name]) for name, buffer in tower.named_buffers())


def test_a_vision_transformer_drops_its_class_token_and_is_pooled() -> None:
    config = TimmTowerConfig.of("vit_tiny_patch16_224", image_size=224, grid=7)
    features = TimmTower(config).eval()(torch.zeros(1, 3, 224, 224)).last_hidden_state
    assert features.shape == (1, 49, 192)
