"""Scoring rules of the official scripts, as functions from texts to numbers that import nothing else of the project."""
