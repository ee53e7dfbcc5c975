"""Ask a model about pictures, in the terminal or in a browser: `python -m milora_vl.chat`."""
