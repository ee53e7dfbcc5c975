"""Models by name: load weights, configs and processors, compose LLaVAs of parts, quantized bases."""
