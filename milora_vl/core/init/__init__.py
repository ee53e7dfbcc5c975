"""The initial factors of a whole model: decomposed, cached, divided among processes."""
