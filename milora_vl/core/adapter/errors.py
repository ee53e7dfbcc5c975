"""`AdapterError`, the error class of adapters, and the check that a module can have one."""

from __future__ import annotations

from milora_vl.common.errors import UserError


class AdapterError(UserError):
    """An adapter that cannot be created, saved or loaded as requested."""


def require_module(model: object) -> None:
    """Raise AdapterError unless `model` is a torch module; users pass the name of a model here."""
    # An isinstance check would import torch, which this file does not need otherwise.
    if "named_modules" not in dir(model):
        raise AdapterError(
            f"expected a model (a torch.nn.Module), got {model!r:.80}",
            code="adapter-not-a-model",
            hint="load it:  model, processor = load_model(NAME)",
        )
