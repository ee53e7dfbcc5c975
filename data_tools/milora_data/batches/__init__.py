"""Records as batches: collators, packing, lengths, the sampler."""
