"""Show records as training sees them."""
