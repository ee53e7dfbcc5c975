"""Records as training sees them."""
