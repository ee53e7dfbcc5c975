"""The error of everything that has to do with adapters."""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter that cannot be made, saved or loaded as asked; the message says what was found and what to do."""
