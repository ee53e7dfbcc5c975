"""Fine-tune a model from a recipe: `python -m milora_vl.train`."""

from milora_vl.train.command import main

__all__ = ["main"]
