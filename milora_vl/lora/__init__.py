"""The adapter in halves on top of PEFT: layers, files, checks against the base."""
