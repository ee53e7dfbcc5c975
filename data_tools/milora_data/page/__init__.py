"""Shared by all HTML pages of this project: base template, style sheet, parts, small pictures."""
