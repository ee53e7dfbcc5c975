"""Find, count and repair what is wrong with a data set."""
