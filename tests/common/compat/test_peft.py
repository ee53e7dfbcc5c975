"""What `milora_vl.common.compat.peft` needs of PEFT."""

from __future__ import annotations

import pytest
from peft.utils.other import ModulesToSaveWrapper

from milora_vl import apply_milora
from milora_vl.common.compat import peft as compat
from milora_vl.common.compat.peft import WholeModule
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
