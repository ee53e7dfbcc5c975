"""Time and error of `milora_vl.core.svd.decompose` against torch.linalg.svd, measured alternately in one process.

python benchmarks/svd.py headline [--repeats 1]    r = 128 at 4096 x 4096 and 4096 x 11008, two spectra
python benchmarks/svd.py llama                     every shape of LLaMA-7B, measured once, multiplied by its count

Each prints one JSON line. Errors are exact: the
relative excess of the norm of the singular values over the full decomposition. `products` is our time as a multiple
of one product W W' of the wide side, which does not depend on how slow a machine's LAPACK is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from milora_vl.core.svd import Factors, decompose

BLOCKS, HIDDEN, MLP = 32, 4096, 11008  # of LLaMA-7B
OURS = 3  # how often ours runs for each full SVD
SPECTRA = ("gaussian", "low-rank")


def main() -> None:
    """Run the chosen part."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=sorted(PARTS))
    options.add_argument("--repeats", type=int, default=1)
    options.add_argument("--rank", type=int, default=128)
    options.add_argument("--device", default="cpu")
    options.add_argument("--scale", type=int, default=1, help="divide all sizes by this number, for a quick test")
    chosen = options.parse_args()
    print(json.dumps(PARTS[chosen.part](chosen)))


def headline(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the two shapes of LLaMA-7B, Gaussian and Gaussian plus a strong low-rank part."""
    rows = []
    for out, inn in ((4096, 4096), (4096, 11008)):
        weights = {name: matrix(out, inn, name, chosen) for name in SPECTRA}
        rows += compare(weights, chosen.rank // chosen.scale, chosen)
    return rows


def llama(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all linear layers of the blocks, each shape once."""
    kinds = {"attention (q, k, v, o)": (HIDDEN, HIDDEN, 4), "MLP in (gate, up)": (MLP, HIDDEN, 2),
             "MLP out (down)": (HIDDEN, MLP, 1)}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for kind, (out, inn, count) in kinds.items():
        W = matrix(out, inn, "gaussian", chosen)
        (measured,) = compare({"gaussian": W}, chosen.rank // chosen.scale, chosen)
        rows.append({"model": "7b", "layer": kind, "count": count * BLOCKS} | measured)
    total, full = (sum(entry[key] * entry["count"] for entry in rows) for key in ("seconds", "svd"))
    number = sum(entry["count"] for entry in rows)
    rows.append({"model": "7b", "layer": "all", "count": number, "seconds": total, "svd": full, "ratio": full / total})
    return rows


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "headline": headline, "llama": llama
}  # fmt: skip


def compare(weights: dict[str, Tensor], rank: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the full SVD and ours alternately, ours several times for each slow SVD; return the medians."""
    times: dict[str, list[float]] = {name: [] for name in weights}
    peers: dict[str, list[float]] = {name: [] for name in weights}
    products: dict[str, list[float]] = {name: [] for name in weights}
    results: dict[str, tuple[Factors, Tensor]] = {}
    for _ in range(chosen.repeats):
        for name, W in weights.items():
            peer, S = timed(lambda W=W: torch.linalg.svd(W, full_matrices=False).S, W.device)
            peers[name].append(peer)
            for _ in range(OURS):
                seconds, found = timed(lambda W=W: decompose(W, rank), W.device)
                times[name].append(seconds)
                products[name].append(product(W))
            results[name] = (found, S)
    return [
        row(
            name,
            W,
            results[name][0],
            statistics.median(times[name]),
            statistics.median(peers[name]),
            results[name][1],
            statistics.median(products[name]),
        )
        for name, W in weights.items()
    ]


def product(W: Tensor) -> float:
    """Return the seconds of one product of W (m, n) with its transpose, of the smaller size (min(m, n))²."""
    wide = W if W.shape[0] <= W.shape[1] else W.T
    return timed(lambda: wide @ wide.T, W.device)[0]


def row(
    name: str, W: Tensor, found: Factors, seconds: float, peer: float, S: Tensor, one_product: float
) -> dict[str, Any]:
    """One row of the table."""
    rank = found.S.numel()
    return {
        "spectrum": name, "shape": f"{W.shape[0]}x{W.shape[1]}", "rank": rank, "part": "minor", "method": found.method,
        "seconds": seconds, "products": seconds / one_product, "svd": peer, "ratio": peer / seconds,
        "true": excess(W, found, S),
        "certificate": found.excess,
    }  # fmt: skip


def excess(W: Tensor, found: Factors, S: Tensor) -> float:
    """Return by how much the norm of W in the minor space exceeds the exact one; 0 below rounding."""
    tall = W.shape[0] >= W.shape[1]
    held = float(torch.linalg.vector_norm(W @ found.Vh.T if tall else found.U.T @ W, dtype=torch.float64))
    true = float(torch.linalg.vector_norm(S[-len(found.S) :], dtype=torch.float64))
    difference = held - true
    if abs(difference) <= 5e-7 * float(torch.linalg.vector_norm(W)):
        return 0.0
    return difference / true if true > 0 else float("inf")


def matrix(out: int, inn: int, family: str, chosen: argparse.Namespace) -> Tensor:
    """Return a float32 Gaussian matrix; `low-rank` adds a part of rank 64, with entries 30 times as large."""
    out, inn = out // chosen.scale, inn // chosen.scale
    generator = torch.Generator().manual_seed(1)
    strong: Tensor | float = 0.0
    if family == "low-rank":
        left, right = torch.randn(out, 64, generator=generator), torch.randn(64, inn, generator=generator)
        strong = 30 / 8 * left @ right
    return (torch.randn(out, inn, generator=generator) + strong).to(chosen.device)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds and the result of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()
