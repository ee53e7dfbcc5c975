"""PEFT's wrapper of a module that trains as a whole, under ZeRO-3."""

from __future__ import annotations

from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

_OF_DEEPSPEED = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")


class WholeModule(ModulesToSaveWrapper):
    """The wrapper with DeepSpeed's hooks of its own.

    It answers for the module inside, and DeepSpeed before 0.19.4 asks it whether it has hooks: it then gets none, and
    the first forward ends in `'Linear' object has no attribute 'ds_grads_remaining'`.
    """

    def _hasattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> bool:
        return name not in _OF_DEEPSPEED and bool(super()._hasattr_wrapped(name, modules))


def keep_hooks_apart(model: PeftModel) -> None:
    """Give the wrappers in a model this class, where DeepSpeed will look at them."""
    if is_deepspeed_zero3_enabled():
        for module in model.modules():
            if type(module) is ModulesToSaveWrapper:
                module.__class__ = WholeModule
