"""Adapters of any origin: read, load, scale, add and multiply them."""
