"""Adapters of other code on a loaded model, told by their files: LLaVA's folders, those on a residual base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from milora_vl import apply_milora, load_model, save_adapter
from milora_vl.export import Options, export
from support.adapter_cases import LLAVA_POLICY, llava_batch, move, pissa_trained
from support.problems import raises_code

pytestmark = pytest.mark.usefixtures("picture_cache")
Factory = Callable[..., tuple[Any, Any]]


@pytest.fixture
def root(tiny_llava: Factory, tmp_path: Path) -> Path:
    """A folder with the model `base`."""
    for part in tiny_llava():
        part.save_pretrained(tmp_path / "base")
    return tmp_path


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**llava_batch(model)).logits


def llava_folder(root: Path) -> Tensor:
    """Write `adapter` and, as LLaVA's train.py would, `trained`; return the logits."""
    model = apply_milora(load_model(root / "base")[0], LLAVA_POLICY)
    move(model)
    save_adapter(model, root / "adapter")
    export(root / "adapter", "llava", root / "trained", Options(base=root / "base", vision_tower="clip"))
    return logits(model)


def test_a_folder_of_llava_is_the_trained_function_on_the_untouched_base(root: Path) -> None:
    expected = llava_folder(root)
    (root / "trained").rename(root / "any-name")
    assert torch.allclose(logits(load_model(root / "base", adapter=root / "any-name")[0]), expected, atol=1e-5)


def test_an_adapter_on_a_residual_base_loads_there_alone_and_at_full_size(root: Path) -> None:
    base, processor = load_model(root / "base")
    tuned = pissa_trained(base, root)
    processor.save_pretrained(root / "residual")
    tuned.peft_config["default"].base_model_name_or_path = str(root / "residual")
    tuned.save_pretrained(root / "trained")
    on_residual = load_model(root / "residual", adapter=root / "trained")[0]
    assert torch.allclose(logits(on_residual), logits(tuned), atol=1e-5)
    with raises_code("", hint="--to merged --base RESIDUAL"):
        load_model(root / "base", adapter=root / "trained")
    with raises_code("", where="--scale", message="is a residual base"):
        load_model(root / "residual", adapter=root / "trained", scale=0.5)
