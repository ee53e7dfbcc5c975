"""Fine-tune a model from a recipe: `python -m milora_vl.train`."""
