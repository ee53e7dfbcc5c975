"""The report of a run (one HTML page and its plots) and the model card: `python -m milora_vl.report`."""
