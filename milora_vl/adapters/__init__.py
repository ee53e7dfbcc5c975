"""Adapter folders of any origin: recognize, read and scale them, and load them onto a model."""
