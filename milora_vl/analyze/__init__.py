"""Analyse the weights of a model, or what a training changed in them: `python -m milora_vl.analyze`."""
