"""What every command is made of: parser, flags, menus, output folders, the frame of an HTML page."""
