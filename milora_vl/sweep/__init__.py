"""`python -m milora_vl.sweep`: train methods x learning rates x ranks x seeds of one recipe and compare them."""
