"""MiLoRA for LLaVA-style models: fine-tune the minor singular components, keep the principal ones (arXiv:2406.09044).

The names below are the stable API; each is imported when it is first asked for, so that `import milora_vl` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milora_vl.adapter import apply_milora, merge
    from milora_vl.adapter_io import load_adapter, save_adapter
    from milora_vl.load import load_model
    from milora_vl.lora.keep_protected import keep_protected
    from milora_vl.policy import Policy, Rule
    from milora_vl.reinit import reinit_peft, restore_split
    from milora_vl.svd import Factors, decompose

__all__ = [
    "Factors",
    "Policy",
    "Rule",
    "apply_milora",
    "decompose",
    "keep_protected",
    "load_adapter",
    "load_model",
    "merge",
    "reinit_peft",
    "restore_split",
    "save_adapter",
]

_HOME = {
    "Factors": "svd",
    "Policy": "policy",
    "Rule": "policy",
    "apply_milora": "adapter",
    "decompose": "svd",
    "keep_protected": "lora.keep_protected",
    "load_adapter": "adapter_io",
    "load_model": "load",
    "merge": "adapter",
    "reinit_peft": "reinit",
    "restore_split": "reinit",
    "save_adapter": "adapter_io",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'milora_vl' has no attribute {name!r}")
    return getattr(import_module(f"milora_vl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
