"""Calibration batches of tiny models, and what an adapter answers to protected inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from milora_vl.core.adapter.lora import lora_layer
from milora_vl.core.calibration.activations import for_each_input
from milora_vl.core.policy import Policy
from milora_vl.core.weights.matrices import is_linear
from support.adapter_cases import llava_batch, one_rule, picture_batch, token_batch


def protecting(**fields: Any) -> list[dict[str, Any]]:
    return one_rule(**{"alpha": 4, "protect": 0.6, **fields})


def text_batches(count: int = 3, vocabulary: int = 40, length: int = 30) -> list[dict[str, Tensor]]:
    ids = token_batch(vocabulary, 4 * count, length)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.chunk(count)]


def llava_batches(model: Any) -> list[dict[str, Tensor]]:
    return [llava_batch(model), *text_batches(2, 200), llava_batch(model)]


def picture_batches() -> list[dict[str, Tensor]]:
    pixels, words = picture_batch()
    return [{"pixels": pixels, "words": words}, {"pixels": pixels + 0.1, "words": words}]


def directions(base: nn.Module, rules: list[dict[str, Any]], batches: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the protected directions V (in, k) of each layer of a base model, by path."""
    inputs = for_each_input(base, Policy.parse(rules).resolve(base), batches, lambda _, __, inputs: inputs)
    return {path: basis.V for path, basis in inputs.items()}


@torch.no_grad()
def leaks(tuned: Any, protected: Mapping[str, Tensor]) -> list[float]:
    """Of each protected layer: its adapter's largest answer to protected inputs, as a share of that to any input.

    It asks the layers of `tuned`, of any PEFT, as the model does: the answer with the adapter minus the one without.
    """
    found = []
    for path, V in protected.items():
        layer = lora_layer(tuned, path)
        if not is_linear(layer.get_base_layer()):
            delta = layer.get_delta_weight("default").float().flatten(1)
            found.append(float((delta @ V).norm() / delta.norm()))
            continue
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        dtype = down.weight.dtype
        answer = lambda x: up(down(x.to(dtype))).float()  # noqa: E731, B023
        any_input = torch.randn(64, V.shape[0], generator=torch.Generator().manual_seed(0))
        scale = answer(any_input / any_input.norm(dim=1, keepdim=True)).norm(dim=1).mean()
        found.append(float(answer(V.T).norm(dim=1).max() / scale))
    assert found
    return found
