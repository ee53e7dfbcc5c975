"""LLaVAs put together from parts, or read from LLaVA's original layout, and written once as a Hugging Face folder."""
