"""Numbers from stored answers: scores, errors, comparisons, tables, files for other programs."""
