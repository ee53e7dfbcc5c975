"""Fingerprints tell another base model from a rounding of the same one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.adapter.save_load import load_adapter, load_checkpoint, save_adapter
from milora_vl.core.adapter.sidecar import Sidecar, fitted
from milora_vl.core.weights.matrices import distance, fingerprint
from support.adapter_cases import LLAVA_POLICY, one_rule
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


@torch.no_grad()
def changed(model: nn.Module, case: str) -> nn.Module:
    parameters = dict(model.named_parameters())
    if case == "embeddings":
        parameters["model.language_model.embed_tokens.weight"].normal_()
    elif case == "head":
        parameters["lm_head.weight"].neg_()
    elif case == "norms":
        parameters["model.language_model.layers.1.input_layernorm.weight"].mul_(3)
    elif case == "biases":
        parameters["model.vision_tower.encoder.layers.0.mlp.fc1.bias"].add_(0.1)
    else:
        torch.manual_seed(1)
        model.model.vision_tower = type(model.model.vision_tower)(model.config.vision_config)
    return model


@pytest.mark.parametrize("rules", [LLAVA_POLICY, one_rule(method="lora")], ids=["anchored", "lora"])
@pytest.mark.parametrize(
    ("case", "first"),
    [
        ("embeddings", "language.embed_tokens.weight"),
        ("head", "language.lm_head.weight"),
        ("norms", "language.layers.1.input_layernorm.weight"),
        ("biases", "vision.layers.0.mlp.fc1.bias"),
        ("tower", "vision.embeddings.class_embedding"),
    ],
)
def test_other_frozen_parameters_warn_and_no_training_continues_on_them(
    tiny_llava, tmp_path: Path, rules, case: str, first: str
) -> None:
    save_adapter(apply_milora(tiny_llava()[0], rules), tmp_path)
    with pytest.warns(UserWarning, match=f"{first}: this frozen parameter"):
        load_adapter(changed(tiny_llava()[0], case), tmp_path)
    with raises_code("adapter-wrong-base", first):
        load_checkpoint(changed(tiny_llava()[0], case), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(changed(tiny_llava()[0], case), tmp_path, allow_base_mismatch=True)
        load_adapter(tiny_llava()[0].bfloat16(), tmp_path)
        load_checkpoint(tiny_llava()[0], tmp_path)


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


class TensorCores(TorchDispatchMode):
    """Products read ten bits of a mantissa, as on a GPU with `tf32: true`, unless the setting of torch forbids it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and torch.backends.cuda.matmul.fp32_precision == "tf32":
            args = [((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9")
def test_tensor_cores_do_not_make_a_weight_another_one() -> None:
    A = weight(rows=128, columns=4096)
    saved, product, matmul = fingerprint(A), A @ A.T, torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with TensorCores():
            assert not torch.allclose(A @ A.T, product)
            assert distance(saved, A) < 1
    finally:
        matmul.fp32_precision = before
