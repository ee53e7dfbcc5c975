"""The error of everything that has to do with adapters."""

from __future__ import annotations

from milora_data.errors import UserError


class AdapterError(UserError):
    """An adapter that cannot be made, saved or loaded as asked."""


def require_module(model: object) -> None:
    """Raise AdapterError for what is no model, such as the name of one."""
    # Told without torch, which this file has no other need of.
    if "named_modules" not in dir(model):
        raise AdapterError(
            f"expected a model (a torch.nn.Module), got {model!r:.80}\nload it:  model, processor = load_model(NAME)"
        )
