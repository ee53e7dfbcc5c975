"""The singular triplets of one weight: minor, principal or random components (arXiv:2406.09044, section 3).

Needs torch alone. `decompose` chooses the way; `extremal` finds a few components without decomposing the whole matrix.
"""

from milora_vl.svd.decomposition import Method, Part, decompose, frobenius
from milora_vl.svd.factors import Factors
from milora_vl.svd.spectrum import singular_values

__all__ = ["Factors", "Method", "Part", "decompose", "frobenius", "singular_values"]
