"""Ask a model: which items, in which order, stored where, resumed how."""
