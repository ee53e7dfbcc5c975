"""Private interfaces of PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.common.compat.torch import change_class

_DEEPSPEED_ATTRIBUTES = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")


class WholeModule(ModulesToSaveWrapper):
    """A ModulesToSaveWrapper that DeepSpeed can put its own hooks on.

    The stock wrapper forwards `hasattr` to the module inside. DeepSpeed before 0.19.4 asks it for hooks, gets the
    answer of the inner module and installs none. The first forward then fails with `'Linear' object has no attribute
    'ds_grads_remaining'`. DeepSpeed 0.19.4 as the lower bound would replace it.
    """

    def _hasattr_wrapped(self, name: str, modules: dict[str, nn.Module]) -> bool:
        return name not in _DEEPSPEED_ATTRIBUTES and bool(super()._hasattr_wrapped(name, modules))


def keep_hooks_apart(model: PeftModel) -> None:
    """Change the wrappers in `model` to WholeModule if DeepSpeed ZeRO-3 is in use."""
    if is_deepspeed_zero3_enabled():
        for module in model.modules():
            if type(module) is ModulesToSaveWrapper:
                change_class(module, WholeModule)


@contextmanager
def calls_replaced(
    modules: Sequence[ModuleType], get_peft_model: Callable[..., Any], from_pretrained: Callable[..., Any]
) -> Iterator[None]:
    """Inside this context `modules` have another `get_peft_model`, and PeftModel another `from_pretrained`.

    A hook of PEFT that is called for each new adapter would replace it.
    """
    with ExitStack() as patches:
        for module in modules:
            patches.enter_context(patch.object(module, "get_peft_model", get_peft_model))
        patches.enter_context(patch.object(PeftModel, "from_pretrained", staticmethod(from_pretrained)))
        yield
