"""Compose a LLaVA from a vision tower, a projector and a language model: `python -m milora_vl.compose`."""
