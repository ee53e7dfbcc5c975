"""An adapter trained on HF's LLaVA, loaded into LLaVA's own class: one base, two layouts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from milora_vl import apply_milora, load_adapter, save_adapter
from milora_vl.core.adapter.folders import AdapterError
from support.adapter_cases import LLAVA_POLICY, anchors, move, token_batch, train_steps
from support.llava_oracle import original_llava
from support.problems import raises_code


@pytest.fixture
def adapted(tiny_llava, tmp_path: Path) -> SimpleNamespace:
    base, processor = tiny_llava()
    other = original_llava(base, processor, tmp_path / "parts")
    model = apply_milora(base, LLAVA_POLICY)
    move(model)
    save_adapter(model, tmp_path / "adapter")
    return SimpleNamespace(model=model, other=other, folder=tmp_path / "adapter")


@pytest.mark.parametrize("is_trainable", [False, True])
def test_it_gives_the_same_logits_and_the_same_projector(adapted, is_trainable: bool) -> None:
    ids = token_batch(200)
    loaded = load_adapter(adapted.other, adapted.folder, is_trainable=is_trainable)
    got = loaded.eval()(ids).logits
    assert torch.allclose(got, adapted.model.eval()(input_ids=ids).logits[..., : got.shape[-1]], atol=1e-5)
    x = torch.randn(2, 32)
    projector = adapted.model.get_base_model().model.multi_modal_projector
    assert torch.allclose(loaded.get_base_model().model.mm_projector(x), projector(x), atol=1e-5)
    assert [t.path for t in loaded.milora_targets][-1] == "model.layers.1.mlp.down_proj"
    assert len(anchors(loaded)) == 26
    assert any(p.requires_grad for p in loaded.parameters()) is is_trainable


@pytest.mark.filterwarnings("ignore:the optimizer ignores rules")
def test_it_trains_on_there_and_comes_back(adapted, tiny_llava) -> None:
    ids = token_batch(200)
    loaded = load_adapter(adapted.other, adapted.folder, is_trainable=True)
    train_steps(loaded.eval(), {"input_ids": ids}, steps=2)
    save_adapter(loaded, adapted.folder / "back")
    back = load_adapter(tiny_llava()[0], adapted.folder / "back")
    got = loaded(ids).logits
    assert torch.allclose(back(input_ids=ids).logits[..., : got.shape[-1]], got, atol=1e-5)


def test_weights_that_milora_json_does_not_tell_of_are_refused(adapted) -> None:
    file = adapted.folder / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.else.weight"] = weights.pop(next(key for key in weights if key.endswith("linear_2.bias")))
    save_file(weights, file)
    with raises_code("adapter-unlisted-weights", says=r"do not match milora.json: .* \(2 differ\)", kind=AdapterError):
        load_adapter(adapted.other, adapted.folder)
