"""What `python -m milora_vl.train` is made of."""
