"""The projector as a file: HF's and LLaVA's names, and no silent misfit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from milora_vl.models.projector import load_projector, projector_of, read_projector, save_projector
from support.problems import raises_code

Factory = Callable[..., tuple[Any, Any]]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in projector_of(model).state_dict().items()}


def test_saved_and_loaded_it_is_the_same(tiny_llava: Factory, tmp_path: Path) -> None:
    first, second = tiny_llava(0)[0], tiny_llava(1)[0]
    file = save_projector(first, tmp_path)
    assert sorted(load_file(file))[0] == "multi_modal_projector.linear_1.bias"
    load_projector(second, tmp_path)
    for name, tensor in weights(first).items():
        assert torch.equal(weights(second)[name], tensor)


def test_a_state_dict_of_the_whole_model_will_do(tiny_llava: Factory, tmp_path: Path) -> None:
    model = tiny_llava()[0]
    save_projector(model, tmp_path, model.state_dict())
    assert read_projector(tmp_path).keys() == weights(model).keys()


def test_llavas_own_file_is_read(tiny_llava: Factory, tmp_path: Path) -> None:
    first, second = tiny_llava(0)[0], tiny_llava(1)[0]
    names = {"linear_1": "0", "linear_2": "2"}
    original = {
        f"model.mm_projector.{names[name.split('.')[0]]}.{name.split('.')[1]}": tensor
        for name, tensor in weights(first).items()
    }
    torch.save(original, tmp_path / "mm_projector.bin")
    load_projector(second, tmp_path / "mm_projector.bin")
    assert torch.equal(weights(second)["linear_2.weight"], weights(first)["linear_2.weight"])


def test_what_does_not_fit_is_refused(tiny_llava: Factory, tiny_llama: Factory, tmp_path: Path) -> None:
    model = tiny_llava()[0]
    torch.save({"model.mm_projector.0.weight": torch.zeros(3, 3)}, tmp_path / "other.bin")
    with raises_code("", message="do not fit the projector"):
        load_projector(model, tmp_path / "other.bin")
    torch.save({"lm_head.weight": torch.zeros(1)}, tmp_path / "none.bin")
    with raises_code("", message="no projector weights in this file"):
        load_projector(model, tmp_path / "none.bin")
    with raises_code("", says="projector"):
        load_projector(model, tmp_path)
    with raises_code("", message="has no projector"):
        projector_of(tiny_llama()[0])
