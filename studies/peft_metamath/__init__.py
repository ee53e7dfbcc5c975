"""PEFT's public comparison on MetaMathQA with our adapters: PEFT's own script, with another `get_model`."""
