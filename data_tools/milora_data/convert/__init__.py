"""Convert other formats to LLaVA JSON."""
