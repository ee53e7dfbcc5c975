"""Refuse PEFT's hotswap_adapter and add_weighted_adapter where they would give wrong results.

Both handle LoRA factors only. If modules are trained in full (PEFT's modules_to_save), hotswap_adapter fails with a
KeyError, and add_weighted_adapter with a single adapter uses the base module instead of the trained one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from peft import LoraConfig, PeftModel
from torch import nn

from milora_vl.adapter.errors import AdapterError

_TO_SERVE = (
    "to serve with stock PEFT:  python -m milora_vl.export FOLDER --to adapter --with_base      (docs/exporting.md)"
)


def refuse_hotswap(model: PeftModel) -> None:
    """Make PEFT's hotswap_adapter raise AdapterError on this model.

    hotswap_adapter is a function, so no method can override it. It reads the model's state dict before it writes, so a
    hook on the state dict can stop it without a change to PEFT.
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
            "hotswap_adapter would change a copy and nothing else: this model computes its factors when it uses them",
            code="adapter-hotswap",
            hint=f"use  model.load_adapter(FOLDER, NAME)\n{_TO_SERVE}",
        )


def require_factors_alone(model: PeftModel, adapters: Sequence[str]) -> None:
    """Raise AdapterError if an adapter contains modules trained in full, which PEFT cannot add."""
    for name in adapters:
        config = model.peft_config.get(name)
        full_modules = config.modules_to_save if isinstance(config, LoraConfig) else None
        if full_modules:
            raise AdapterError(
                f"add_weighted_adapter adds LoRA factors only, but this adapter contains modules trained in full: "
                f"{', '.join(sorted(full_modules)[:3])}",
                code="adapter-full-modules",
                where=f"adapter {name!r}",
                hint=_TO_SERVE,
            )
