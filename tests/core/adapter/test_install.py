from __future__ import annotations

import pytest
import torch

from milora_vl.core.adapter.anchored import anchors_of, factors, fixed_names, has_anchor, joined_state
from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.adapter.lora import lora_layer
from support.adapter_cases import LLAVA_POLICY, Pictures, anchors, move

EVERY_KIND = [
    {"modules": "*", "method": "milora", "protect": 0, "rank": 2},
    {"modules": "words", "method": "lora"},
]


def test_the_factors_of_every_kind_of_layer_are_found() -> None:
    model = apply_milora(Pictures(), EVERY_KIND)
    for path, shapes in {
        "patch": ((4, 3, 3, 3), (8, 4, 1, 1)),
        "head": ((4, 8), (5, 4)),
    }.items():
        layer = lora_layer(model, path)
        assert has_anchor(layer, "default")
        assert tuple(tuple(f.shape) for f in factors(layer, "default")) == shapes
        assert [a.numel() * 2 for a in anchors_of(layer, "default")] == [f.numel() for f in factors(layer, "default")]
    assert len(list(fixed_names(model))) == 4
    assert set(fixed_names(model)) <= {name for name, _ in model.named_buffers()}


@pytest.mark.parametrize("prefix", ["", "_forward_module."])
def test_raw_names_of_a_gathered_state_are_joined(prefix: str) -> None:
    """DeepSpeed and FSDP1 gather parameters and buffers by their own names."""
    model = apply_milora(Pictures(), EVERY_KIND)
    move(model)
    raw = {prefix + name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    joined = joined_state(raw)
    expected = {prefix + name: t for name, t in model.state_dict().items()}
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], expected[name]) for name in expected)


def test_differences_start_at_zero_in_float32_and_anchors_have_the_dtype_of_the_base(tiny_llava) -> None:
    model = apply_milora(tiny_llava()[0].bfloat16(), LLAVA_POLICY)
    for name, anchor in anchors(model).items():
        delta = model.get_parameter(name.replace("anchor", "delta"))
        assert anchor.dtype == torch.bfloat16
        assert delta.dtype == torch.float32
        assert not delta.any()
