"""A LLaVA from a vision tower, a projector and a language model. `python -m milora_vl.compose`."""

from milora_vl.compose.command import main

__all__ = ["main"]
