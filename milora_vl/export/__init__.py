"""`python -m milora_vl.export`: convert an adapter of any origin to another form; `export` from Python."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from milora_vl.export.request import Options

if TYPE_CHECKING:
    from milora_vl.export.write import Exported, export

__all__ = ["Exported", "Options", "export"]


def __getattr__(name: str) -> Any:
    if name not in ("Exported", "export"):
        raise AttributeError(f"module 'milora_vl.export' has no attribute {name!r}")
    return getattr(import_module("milora_vl.export.write"), name)  # imported on first use: it needs torch and PEFT
