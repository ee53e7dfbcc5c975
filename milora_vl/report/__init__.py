"""What `python -m milora_vl.report` is made of."""
