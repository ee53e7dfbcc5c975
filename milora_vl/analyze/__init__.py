"""What is in a weight, and what a training changed in it. `python -m milora_vl.analyze`."""

from milora_vl.analyze.command import main

__all__ = ["main"]
