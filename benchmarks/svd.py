"""Time and error of `milora_vl.svd.decompose` against torch.linalg.svd, measured alternately in one process.

python benchmarks/svd.py headline [--repeats 1]    r = 128 at 4096 x 4096 and 4096 x 11008, two spectra
python benchmarks/svd.py families                  spectrum families at 2048 x 2048
python benchmarks/svd.py principal                 principal part against PEFT's pissa_niter_4
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

from milora_vl.svd import Factors, decompose

BLOCKS, HIDDEN, MLP = 32, 4096, 11008  # of LLaMA-7B
OURS = 3  # how often ours runs for each full SVD
FAMILIES = ("gaussian", "low-rank", "power 1/i", "exponential 1e-4", "exponential 1e-6", "rank-deficient", "clustered")


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
        weights = {name: matrix(out, inn, name, chosen) for name in FAMILIES[:2]}
        rows += compare(weights, chosen.rank // chosen.scale, chosen)
    return rows


def families(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every family of spectra at one size, minor and principal part."""
    weights = {name: matrix(2048, 2048, name, chosen) for name in FAMILIES}
    rank = 64 // chosen.scale
    return compare(weights, rank, chosen) + compare(weights, rank, chosen, part="principal")


def principal(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the principal part, ours and PEFT's: torch.svd_lowrank with niter 4 (pissa_niter_4)."""
    rows = []
    rank = chosen.rank // chosen.scale
    for name in FAMILIES[:3]:
        W = matrix(4096, 4096, name, chosen)
        full, S = timed(lambda W=W: torch.linalg.svd(W, full_matrices=False).S, W.device)
        seconds, found = timed(lambda W=W: decompose(W, rank, "principal"), W.device)
        rows.append(row(name, W, found, seconds, full, S, "principal", product(W)))
        torch.manual_seed(0)
        lowrank, peer = timed(lambda W=W: torch.svd_lowrank(W, rank, niter=4), W.device)
        true = float(torch.linalg.vector_norm(S[:rank], dtype=torch.float64))
        missed = 1 - float(torch.linalg.vector_norm(peer[1], dtype=torch.float64)) / true
        told = {"spectrum": name, "shape": f"{W.shape[0]}x{W.shape[1]}", "rank": rank, "part": "principal"}
        rows.append(told | {"method": "pissa_niter_4", "seconds": lowrank, "svd": full, "ratio": full / lowrank,
                            "true": missed, "certificate": None})  # fmt: skip
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
    "headline": headline, "families": families, "principal": principal, "llama": llama
}  # fmt: skip


def compare(
    weights: dict[str, Tensor], rank: int, chosen: argparse.Namespace, part: Any = "minor"
) -> list[dict[str, Any]]:
    """Time the full SVD and ours alternately, ours several times for each slow SVD; return the medians."""
    times: dict[str, list[float]] = {name: [] for name in weights}
    peers: dict[str, list[Any]] = {name: [] for name in weights}
    products: dict[str, list[float]] = {name: [] for name in weights}
    results: dict[str, tuple[Factors, Tensor]] = {}
    for _ in range(chosen.repeats):
        for name, W in weights.items():
            peer, S = full(W)
            peers[name].append(peer)
            for _ in range(OURS):
                seconds, found = timed(lambda W=W: decompose(W, rank, part), W.device)
                times[name].append(seconds)
                products[name].append(product(W))
            results[name] = (found, S)
    return [
        row(
            name,
            W,
            results[name][0],
            statistics.median(times[name]),
            None if None in peers[name] else statistics.median(peers[name]),
            results[name][1],
            part,
            statistics.median(products[name]),
        )
        for name, W in weights.items()
    ]


def full(W: Tensor) -> tuple[float | None, Tensor]:
    """Return seconds and singular values of the full decomposition; None and the float64 values if LAPACK fails."""
    try:
        return timed(lambda: torch.linalg.svd(W, full_matrices=False).S, W.device)
    except torch.linalg.LinAlgError:
        return None, torch.linalg.svdvals(W.double()).float()


def product(W: Tensor) -> float:
    """Return the seconds of one product of W (m, n) with its transpose, of the smaller size (min(m, n))²."""
    wide = W if W.shape[0] <= W.shape[1] else W.T
    return timed(lambda: wide @ wide.T, W.device)[0]


def row(
    name: str, W: Tensor, found: Factors, seconds: float, peer: float | None, S: Tensor, part: str, one_product: float
) -> dict[str, Any]:
    """One row of the table."""
    rank = found.S.numel()
    return {
        "spectrum": name, "shape": f"{W.shape[0]}x{W.shape[1]}", "rank": rank, "part": part, "method": found.method,
        "seconds": seconds, "products": seconds / one_product, "svd": peer, "ratio": peer and peer / seconds,
        "true": excess(W, found, S, part),
        "certificate": found.excess,
    }  # fmt: skip


def excess(W: Tensor, found: Factors, S: Tensor, part: str) -> float:
    """Return by how much the norm of W in the space exceeds (principal: misses) the exact one; 0 below rounding."""
    tall = W.shape[0] >= W.shape[1]
    held = float(torch.linalg.vector_norm(W @ found.Vh.T if tall else found.U.T @ W, dtype=torch.float64))
    chosen = S[-len(found.S) :] if part == "minor" else S[: len(found.S)]
    true = float(torch.linalg.vector_norm(chosen, dtype=torch.float64))
    difference = held - true if part == "minor" else true - held
    if abs(difference) <= 5e-7 * float(torch.linalg.vector_norm(W)):
        return 0.0
    return difference / true if true > 0 else float("inf")


def matrix(out: int, inn: int, family: str, chosen: argparse.Namespace) -> Tensor:
    """Return a float32 matrix with the named spectrum."""
    out, inn = out // chosen.scale, inn // chosen.scale
    generator = torch.Generator().manual_seed(1)
    if family == "gaussian":
        return torch.randn(out, inn, generator=generator).to(chosen.device)
    if family == "low-rank":  # the entries of the strong part are 30 times larger than the others
        left, right = torch.randn(out, 64, generator=generator), torch.randn(64, inn, generator=generator)
        return (torch.randn(out, inn, generator=generator) + 30 / 8 * left @ right).to(chosen.device)
    count = min(out, inn)
    i = torch.arange(count, dtype=torch.float64)
    noise = torch.rand(count, generator=generator, dtype=torch.float64)
    S = {
        "power 1/i": 1 / (i + 1),
        "exponential 1e-4": 10 ** (-4 * i / count),
        "exponential 1e-6": 10 ** (-6 * i / count),
        "rank-deficient": torch.where(i < count - count // 8, 1 - 0.5 * i / count, 0.0 * i),
        "clustered": torch.where(i < count - count // 8, 2 - i / count, 0.5 + 1e-4 * noise),
    }[family]  # fmt: skip
    U = torch.linalg.qr(torch.randn(out, count, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(inn, count, generator=generator, dtype=torch.float64)).Q
    return ((U * S) @ V.T).float().to(chosen.device)


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
