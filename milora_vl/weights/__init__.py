"""One weight of a model: read as a matrix, fingerprinted, its factors cached, work shared across processes."""
