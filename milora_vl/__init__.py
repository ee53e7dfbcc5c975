"""The stable Python API, such as `apply_milora` and `load_model`.

Each name is imported at its first use, so that `import milora_vl` is fast and has no side effects.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from milora_vl.core.adapter.apply import apply_milora, merge
    from milora_vl.core.adapter.load import load_adapter
    from milora_vl.core.adapter.rates import parameter_groups
    from milora_vl.core.adapter.reinit import reinit_peft, restore_split
    from milora_vl.core.adapter.save import save_adapter
    from milora_vl.core.calibration.texts import calibration_texts
    from milora_vl.core.policy import Policy, Rule
    from milora_vl.core.svd import Factors, decompose
    from milora_vl.interop.load_model import load_model
    from milora_vl.models.collator_for import collator_for

__all__ = [
    "Factors",
    "Policy",
    "Rule",
    "apply_milora",
    "calibration_texts",
    "collator_for",
    "decompose",
    "load_adapter",
    "load_model",
    "merge",
    "parameter_groups",
    "reinit_peft",
    "restore_split",
    "save_adapter",
]

_MODULE_OF = {
    "Factors": "core.svd",
    "Policy": "core.policy",
    "Rule": "core.policy",
    "apply_milora": "core.adapter.apply",
    "calibration_texts": "core.calibration.texts",
    "collator_for": "models.collator_for",
    "decompose": "core.svd",
    "load_adapter": "core.adapter.load",
    "load_model": "interop.load_model",
    "merge": "core.adapter.apply",
    "parameter_groups": "core.adapter.rates",
    "reinit_peft": "core.adapter.reinit",
    "restore_split": "core.adapter.reinit",
    "save_adapter": "core.adapter.save",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'milora_vl' has no attribute {name!r}")
    return getattr(import_module(f"milora_vl.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
