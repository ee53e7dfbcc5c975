"""LLaVA JSON out of other formats."""
