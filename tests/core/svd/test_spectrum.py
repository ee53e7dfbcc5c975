from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from milora_vl.core.policy import Policy
from milora_vl.core.weights.matrices import as_matrix, matrix_shape
from milora_vl.train.spectrum import layer_spectra

POLICY = """
- {modules: language, method: milora, protect: 0, rank: 4}
- {modules: projector, method: full}
"""


def test_one_layer_per_tower_with_the_band_that_trains(tiny_llava: Callable[..., Any]) -> None:
    model, _ = tiny_llava()
    language, projector, vision = layer_spectra(model, Policy.parse(POLICY).resolve(model))
    weight = model.get_submodule(language["path"]).weight
    assert language["path"].endswith("layers.1.mlp.down_proj")
    assert language["shape"] == list(weight.shape)
    torch.testing.assert_close(torch.tensor(language["sigma"]), torch.linalg.svdvals(weight.detach()))
    assert language["trained"] == [min(weight.shape) - 4, min(weight.shape)]
    assert (projector["method"], projector["trained"]) == ("full", [0, min(projector["shape"])])
    assert (vision["method"], vision["trained"]) == ("frozen", None)


def test_an_applied_adapter_changes_nothing(tiny_llava: Callable[..., Any]) -> None:
    from milora_vl import apply_milora

    model, _ = tiny_llava()
    targets = Policy.parse(POLICY).resolve(model)
    before = layer_spectra(model, targets)
    assert layer_spectra(apply_milora(model, Policy.parse(POLICY)), targets) == before


@pytest.mark.parametrize(
    ("method", "trained"), [("milora", [60, 64]), ("pissa", [0, 4]), ("lora", None), ("random", None)]
)
def test_the_band_follows_the_method(tiny_llama: Callable[..., Any], method: str, trained: list[int] | None) -> None:
    model, _ = tiny_llama()
    targets = Policy.parse(f"[{{modules: language, method: {method}, rank: 4}}]").resolve(model)
    (layer,) = layer_spectra(model, targets)
    assert (layer["tower"], layer["trained"], layer["rank"]) == ("language", trained, 4)


@pytest.mark.parametrize("layer", [nn.Linear(3, 5), Conv1D(5, 3), nn.Conv2d(6, 5, 3), nn.Embedding(3, 5)])
def test_the_shape_of_a_layer_is_known_where_zero3_has_taken_its_weight(layer: nn.Module) -> None:
    expected = tuple(as_matrix(layer, layer.get_parameter("weight")).shape)
    for parameter in layer.parameters():
        parameter.data = torch.empty(0)
    assert matrix_shape(layer) == expected


def test_a_convolution_is_a_flat_matrix() -> None:
    model = nn.Module()
    model.language_model = nn.Sequential(nn.Linear(4, 4))
    model.multi_modal_projector = nn.Sequential(nn.Linear(4, 4))
    model.vision_tower = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    vision = layer_spectra(model, [])[-1]
    assert (vision["path"], vision["shape"]) == ("vision_tower.0", [8, 27])
    weight = model.get_parameter("vision_tower.0.weight").detach().flatten(1)
    torch.testing.assert_close(torch.tensor(vision["sigma"]), torch.linalg.svdvals(weight))


def test_what_is_too_large_or_not_there_is_said() -> None:
    large = nn.Linear(4096, 4096, bias=False, device="meta").to_empty(device="cpu")
    absent = nn.Linear(8, 8, device="meta")
    for layer, words in ((large, "4096 x 4096"), (absent, "not loaded")):
        (entry,) = layer_spectra(nn.Sequential(layer), [])
        assert entry["sigma"] == []
        assert words in str(entry["note"])
