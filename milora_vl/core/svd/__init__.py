"""Singular triplets of one weight: minor, principal or random components (arXiv:2406.09044, section 3).

This package needs torch alone. `decompose` chooses the algorithm: `decomposition.py` decomposes a whole matrix, and
`search.py` computes a few components at one end of the spectrum, much faster and with an error bound.
"""

from milora_vl.core.svd.decomposition import Algorithm, Factors, Part, decompose, frobenius

__all__ = ["Algorithm", "Factors", "Part", "decompose", "frobenius"]
