"""An adapter of any origin, written in another form. `python -m milora_vl.export`."""

from milora_vl.export.command import Exported, export, main

__all__ = ["Exported", "export", "main"]
