"""Refuse what PEFT's hotswap_adapter and add_weighted_adapter cannot do with our adapters, and say what to do instead.

Both handle only LoRA factors. On modules that were trained in full (PEFT's modules_to_save) the first fails with a
KeyError, and the second, given a single adapter, uses the base's module instead of the trained one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peft import LoraConfig, PeftModel
from torch import nn

from milora_vl.lora.errors import AdapterError

_TO_SERVE = (
    "to serve, with stock PEFT:  python -m milora_vl.export FOLDER --to adapter --with_base      (docs/exporting.md)"
)


def refuse_hotswap(model: PeftModel) -> None:
    """Make PEFT's hotswap_adapter raise AdapterError on this model.

    It is a function and no method, and it reads the model's state dict before it writes anything: a hook there is the
    one place to stop it without a change of PEFT itself.
    """
    model.register_state_dict_pre_hook(_require_other_caller)


def _require_other_caller(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") == "torch.nn.modules.module" and frame.f_back is not None:
        frame = frame.f_back
    if frame.f_code.co_name == "<setcomp>" and frame.f_back is not None:  # up to Python 3.11
        frame = frame.f_back
    if frame.f_code.co_name == "hotswap_adapter_from_state_dict":
        raise AdapterError(
            "hotswap_adapter would change a copy and nothing else: this model keeps its factors in halves\n"
            f"here:  model.load_adapter(FOLDER, NAME)\n{_TO_SERVE}"
        )


def require_factors_alone(model: PeftModel, adapters: Sequence[str]) -> None:
    """Raise AdapterError where an adapter holds modules that were trained in full, which PEFT cannot add up."""
    for name in adapters:
        config = model.peft_config.get(name)
        whole = config.modules_to_save if isinstance(config, LoraConfig) else None
        if whole:
            raise AdapterError(
                f"add_weighted_adapter adds LoRA factors, and adapter {name!r} holds modules trained in full: "
                f"{', '.join(sorted(whole)[:3])}\n{_TO_SERVE}"
            )
