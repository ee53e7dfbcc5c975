"""Several adapters on one base: stock PEFT swaps them (docs/export.md)."""

from __future__ import annotations

from pathlib import Path

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


@pytest.mark.parametrize("form", ["adapter", "rank-4"])
def test_exported_adapters_are_hot_swapped_by_stock_peft(form: str, tiny_folder: Path, tmp_path: Path) -> None:
    expected = {}
    for name, size in (("a", 0.05), ("b", 0.2)):
        model = apply_milora(load_model(tiny_folder)[0], POLICY)
        move(model, size)
        expected[name] = logits(model)
        save_adapter(model, tmp_path / name)
        export(tmp_path / name, form, tmp_path / form / name)
    assert not torch.allclose(expected["a"], expected["b"], atol=1e-2)
    served = PeftModel.from_pretrained(load_model(tiny_folder)[0], tmp_path / form / "a")
    torch.testing.assert_close(logits(served), expected["a"], atol=1e-5, rtol=0)
    hotswap_adapter(served, str(tmp_path / form / "b"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits(served), expected["b"], atol=1e-5, rtol=0)
