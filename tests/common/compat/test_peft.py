"""What `milora_vl.common.compat.peft` needs of PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from milora_vl import apply_milora
from milora_vl.common.compat import peft as compat
from milora_vl.common.compat.peft import ForwardVariant, WholeModule, set_variant
from support.adapter_cases import LLAVA_POLICY


def test_hooks_of_a_module_inside_are_not_those_of_its_wrapper(tiny_llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed registers from the inside out, and asks each module whether it has been there."""
    monkeypatch.setattr(compat, "is_deepspeed_zero3_enabled", lambda: True)
    model = apply_milora(tiny_llava()[0], LLAVA_POLICY)
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    assert wrappers
    for wrapper in wrappers:
        assert type(wrapper) is WholeModule
        wrapper.modules_to_save["default"].post_bwd_fn = object()
        assert not hasattr(wrapper, "post_bwd_fn")
        assert wrapper.weight is wrapper.modules_to_save["default"].weight
        wrapper.post_bwd_fn = "its own"
        assert wrapper.post_bwd_fn == "its own"


def test_peft_still_asks_the_method_that_is_overridden() -> None:
    assert hasattr(ModulesToSaveWrapper, "_hasattr_wrapped")


def test_without_zero3_the_wrappers_are_pefts(tiny_llava) -> None:
    model = apply_milora(tiny_llava()[0], LLAVA_POLICY)
    assert not any(isinstance(module, WholeModule) for module in model.modules())


class Doubled(ForwardVariant):
    """An update that is twice as large, so that a call of it shows."""

    def update(self, down, up, x, onto, scaling, drops):
        return onto + 2 * scaling * up(down(x))


def test_peft_calls_the_variant_of_an_adapter_and_merges_as_without_it() -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config).eval()
    layer, x = model.base_model.model[0], torch.randn(5, 4)
    before, stock, W = layer.base_layer(x), model(x), layer.base_layer.weight.clone()
    set_variant(layer, "default", Doubled())
    torch.testing.assert_close(model(x) - before, 2 * (stock - before))
    torch.testing.assert_close(model(x, adapter_names=["default"] * 5), model(x))
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(model(x), stock)
        model.unmerge_adapter()
        torch.testing.assert_close(layer.base_layer.weight.data, W)
    handle = layer.lora_B["default"].register_forward_hook(lambda *_: None)  # hooks see PEFT's own products
    torch.testing.assert_close(model(x), stock)
    handle.remove()
    set_variant(layer, "default", None)
    torch.testing.assert_close(model(x), stock)
