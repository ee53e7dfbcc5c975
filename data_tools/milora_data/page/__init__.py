"""The look that all HTML pages of this project share: frame, style sheet, parts, small pictures."""
