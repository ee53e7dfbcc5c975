"""Adapter folders of any origin: recognize them, read them, and load them onto a model."""
