"""Fingerprints tell another base model from a rounding of the same one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.adapter.sidecar import Sidecar, fitted
from milora_vl.core.weights.matrices import distance, fingerprint
from support.adapter_cases import LLAVA_POLICY
from support.problems import raises_code


def sidecar_of(model: nn.Module, rules) -> Sidecar:
    return apply_milora(model, rules).sidecars["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_base_fits_in_any_precision(tiny_llava, dtype: torch.dtype) -> None:
    sidecar = sidecar_of(tiny_llava()[0].to(dtype), LLAVA_POLICY)
    for here in (torch.float32, torch.bfloat16):
        assert fitted(tiny_llava()[0].to(here), sidecar, allow_base_mismatch=False) == sidecar


def test_another_base_is_refused_with_the_way_out(tiny_llava) -> None:
    sidecar = sidecar_of(tiny_llava()[0], LLAVA_POLICY)
    other, _ = tiny_llava(seed=1)
    way_out = "load the base model that adapter_config.json names"
    with raises_code("adapter-wrong-base", "model.language_model.layers.", "14 of 14 weights differ", way_out):
        fitted(other, sidecar, allow_base_mismatch=False)
    assert fitted(other, sidecar, allow_base_mismatch=True) == sidecar


def test_one_changed_layer_is_found(tiny_llava) -> None:
    sidecar = sidecar_of(tiny_llava()[0], LLAVA_POLICY)
    other, _ = tiny_llava()
    other.model.language_model.layers[1].mlp.up_proj.weight.data *= 1.01
    with raises_code("adapter-wrong-base", "layers.1.mlp.up_proj", "1 of 14 weights"):
        fitted(other, sidecar, allow_base_mismatch=False)


def test_a_padded_vocabulary_is_the_same_base(tiny_llama) -> None:
    rules = [{"modules": "lm_head", "method": "milora", "protect": 0, "rank": 2}]
    sidecar = sidecar_of(tiny_llama()[0], rules)
    other, _ = tiny_llama()
    other.resize_token_embeddings(320)
    assert fitted(other, sidecar, allow_base_mismatch=False) == sidecar


def weight(seed: int = 0, rows: int = 48, columns: int = 40) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("there", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("here", [torch.float32, torch.bfloat16, torch.float16])
def test_roundings_of_one_weight_are_the_same(there: torch.dtype, here: torch.dtype) -> None:
    for seed in range(20):
        assert distance(fingerprint(weight(seed).to(there)), weight(seed).to(here)) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_weights_are_not(dtype: torch.dtype) -> None:
    for seed in range(20):
        assert distance(fingerprint(weight(seed).to(dtype)), weight(seed + 1).to(dtype)) > 5
