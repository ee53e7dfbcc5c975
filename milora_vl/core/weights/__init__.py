"""One weight of a model: read it as a matrix, fingerprint it, cache its factors, share the work across processes."""
