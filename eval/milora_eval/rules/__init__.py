"""Scoring rules: what one answer is worth, by the official scripts. Text in, numbers out; nothing else is imported."""
