"""The commands of `python -m milora_eval`."""
