"""Adapter folders of any origin: what they hold, how they are read, and how they load onto a model."""
