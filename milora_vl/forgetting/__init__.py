"""Measure how much a tuned model has forgotten of its base model: `python -m milora_vl.forgetting`.

The measure of the paper (arXiv:2406.09044, after Kalajdzievski 2024) is the cross-entropy of the tuned model against
the predicted distributions of the base model, in nats per token. Its minimum is the entropy of the base model; the
difference is the Kullback-Leibler divergence. It is measured on general text and on the base
model's answers about pictures.
"""
