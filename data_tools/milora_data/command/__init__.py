"""Shared by all commands: parsers, flags, menus, atomic file writes, web addresses."""
