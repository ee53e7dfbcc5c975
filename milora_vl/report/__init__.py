"""The report of a run: one HTML page, its plots, and the model card. `python -m milora_vl.report`."""

from milora_vl.report.command import main

__all__ = ["main"]
