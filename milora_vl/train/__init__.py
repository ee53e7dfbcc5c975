"""Fine-tune a model by a recipe. `python -m milora_vl.train`."""

from milora_vl.train.command import main, train

__all__ = ["main", "train"]
