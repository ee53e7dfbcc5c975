"""Compute one row of layers.jsonl: a layer of a base model, or the change of a layer."""

from __future__ import annotations

from typing import Any

import torch

from milora_vl.analyze import measures
from milora_vl.analyze.changes import Change
from milora_vl.analyze.weights import Weights
from milora_vl.core.svd import decompose, singular_values

Row = dict[str, Any]


def base_row(path: str, base: Weights, device: torch.device, rank: int) -> Row:
    """Return the spectrum of one weight. `minor_energy` is at `rank`; all of `sigma` is kept for the curves."""
    W = base.matrix(path).to(device)
    sigma = singular_values(W).cpu()
    return _place(path, base) | {
        "norm": _rounded(torch.linalg.vector_norm(sigma.double())),
        "effective_rank": _rounded(measures.effective_rank(sigma)),
        "stable_rank": _rounded(measures.stable_rank(sigma)),
        "decay_exponent": _rounded(measures.decay_exponent(sigma)),
        "condition_number": _rounded(measures.condition_number(sigma)),
        "minor_energy": _rounded(measures.minor_energy(sigma, rank)),
        "sigma": [_rounded(value) for value in sigma.tolist()],
    }


def update_row(change: Change, base: Weights, device: torch.device, rank: int) -> Row:
    """Return the measures of one changed weight, at the rank of its adapter or else at `rank`."""
    path = change.path
    W = base.matrix(path).to(device)
    r = min(change.rank or rank, *W.shape)
    update, norm, tuned = change.update(W, base, r)
    full = decompose(W.float(), min(W.shape), "principal")
    top = decompose(tuned, min(measures.INTRUDER_K, *W.shape), "principal")
    of_update, of_base = measures.amplification(W, update, r)
    like_top, like_bottom, like_random = measures.similarities(full, update, r)
    return _place(path, base) | {
        "method": change.method,
        "rank": r,
        "norm": _rounded(full.norm),
        "update_norm": _rounded(norm),
        "relative_update": _rounded(norm / full.norm if full.norm else None),
        "amplification": _rounded(of_update / of_base if of_base else None),
        "update_inside": _rounded(of_update),
        "base_inside": _rounded(of_base),
        "base_inside_top": _rounded(torch.linalg.vector_norm(full.S[:r].double())),
        "base_inside_random": _rounded(measures.expected_inside(full.norm, (W.shape[0], W.shape[1]), r)),
        "similarity_top": _rounded(like_top),
        "similarity_bottom": _rounded(like_bottom),
        "similarity_random": _rounded(like_random),
        "intruders": measures.intruders(full, top.U),
        **{name: _rounded(value) for name, value in change.moves().items()},
    }


def _place(path: str, base: Weights) -> Row:
    towers = base.towers
    block = towers.block_of(path)
    return {
        "path": path,
        "tower": towers.tower_of(path) or "other",
        "block": block,
        "family": towers.family_of(path) or towers.tower_of(path) or "other",
        "module": towers.inside_block(path) if block is not None else path.rpartition(".")[2],
        "shape": list(base.shape(path)),
    }


def _rounded(value: Any) -> float | None:
    """Round to six digits, the precision of float32 weights."""
    return None if value is None else float(f"{float(value):.6g}")
