"""Several adapters on one base: stock PEFT swaps and adds them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from milora_vl import apply_milora, load_model, save_adapter
from milora_vl.export import export
from support.adapter_cases import llava_batch, move

POLICY = "[{modules: language, method: milora, protect: 0, rank: 2}, {modules: projector, method: lora, rank: 2}]"


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(**llava_batch(model)).logits


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two adapters, the logits of each, and both exported."""
    root = tmp_path_factory.mktemp("swap")
    expected = {}
    for name, size in (("a", 0.05), ("b", 0.2)):
        model = apply_milora(load_model(tiny_folder)[0], POLICY)
        move(model, size)
        expected[name] = logits(model)
        save_adapter(model, root / name)
        for form in ("adapter", "rank-4"):
            export(root / name, form, root / form / name)
    assert not torch.allclose(expected["a"], expected["b"], atol=1e-2)
    return SimpleNamespace(root=root, base=tiny_folder, logits=expected)


@pytest.fixture(params=["adapter", "rank-4"])
def folder(made: SimpleNamespace, request: pytest.FixtureRequest) -> Path:
    """The two adapters in one of the forms."""
    return made.root / request.param


@pytest.fixture
def served(made: SimpleNamespace, folder: Path) -> PeftModel:
    """As docs/export.md has it: stock PEFT."""
    return PeftModel.from_pretrained(load_model(made.base)[0], folder / "a")


def test_exported_adapters_are_hot_swapped_by_stock_peft(
    made: SimpleNamespace, folder: Path, served: PeftModel
) -> None:
    torch.testing.assert_close(logits(served), made.logits["a"], atol=1e-5, rtol=0)
    hotswap_adapter(served, str(folder / "b"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(served), made.logits["b"], atol=1e-5, rtol=0)


def test_exported_adapters_are_added_up_by_stock_peft(folder: Path, served: PeftModel) -> None:
    served.load_adapter(str(folder / "b"), "b")
    path = "model.language_model.layers.0.mlp.up_proj"
    layer = served.get_base_model().get_submodule(path)
    expected = 0.3 * layer.get_delta_weight("default") + 0.7 * layer.get_delta_weight("b")
    for how, options in (("cat", {}), ("svd", {"svd_rank": 8})):
        served.add_weighted_adapter(["default", "b"], [0.3, 0.7], how, combination_type=how, **options)
        torch.testing.assert_close(layer.get_delta_weight(how), expected, atol=1e-5, rtol=0)
