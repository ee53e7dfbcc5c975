"""Find, count and repair errors in a data set."""
