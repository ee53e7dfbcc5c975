"""Private interfaces of PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.common.compat.torch import change_class, has_hooks

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


class ForwardVariant(LoraVariant):  # type: ignore[misc]
    """A variant of PEFT's LoRA that computes the update of a linear layer in another way. It merges as PEFT's LoRA.

    PEFT 0.18 to 0.21 call this interface private. A stable one would replace it.
    """

    def update(self, down: Any, up: Any, x: Tensor, onto: Tensor, scaling: float, drops: bool) -> Tensor:
        """Return `onto` + s B A x, in the dtype of `onto`, for the factors `lora_A[name]` and `lora_B[name]`.

        PEFT has cast x to the dtype of A. `drops` is True if dropout has been applied to it.
        """
        raise NotImplementedError

    def forward(  # type: ignore[override]
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return `result` + s B A x: `update`, or PEFT's products where hooks or tracing see the factors alone."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        is_plain = up.bias is None and isinstance(scaling, int | float) and not (has_hooks(down) or has_hooks(up))
        if is_plain and not is_traced:
            drops = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
            return self.update(down, up, dropout(x), result, scaling, drops)
        return result + up(down(dropout(x)).to(next(up.parameters()).dtype)) * scaling

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        pass

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def set_variant(layer: LoraLayer, adapter: str, variant: ForwardVariant | None) -> None:
    """Let `variant` compute the forward pass of an adapter in a layer; None: PEFT's own.

    PEFT before 0.19 keeps the variant of an adapter that is deleted. A public method would replace it.
    """
    if variant is None:
        layer.lora_variant.pop(adapter, None)
    else:
        layer.lora_variant[adapter] = variant
