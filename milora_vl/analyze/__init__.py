"""Analyse the weights of a model, or what a training changed in them: `python -m milora_vl.analyze`."""

from milora_vl.analyze.command import main

__all__ = ["main"]
