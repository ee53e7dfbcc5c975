"""What all commands share: parsers, flags, menus, files written whole, HTML pages."""
