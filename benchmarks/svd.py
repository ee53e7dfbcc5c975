"""The decomposition: one matrix against torch.linalg.svd, and a whole model against PEFT's `pissa`.

python benchmarks/svd.py headline    r = 128 at 4096 x 4096 and 4096 x 11008, two spectra
python benchmarks/svd.py llama       every shape of LLaMA-7B, measured once, multiplied by its count
python benchmarks/svd.py model [--model smollm2|7b-block] [--rank 32] [--alone]

`model` decomposes the 210 linear layers of SmolLM2-135M, or the seven of one block of LLaMA-7B (Gaussian): without a
cache, filling one, and from it; without --alone also by a full SVD of each weight, and by PEFT.
Each prints one JSON line. Errors are exact: the relative excess of the norm of the singular values over the full
decomposition. `products` is our time as a multiple of one product W W' of the wide side, which does not depend on how
slow a machine's LAPACK is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.timing import Work, memory, reset_peak, timed
from milora_vl.core.adapter.initialize import initialize
from milora_vl.core.policy import Policy
from milora_vl.core.svd import Factors, decompose
from milora_vl.core.weights.matrices import read_matrix
from milora_vl.interop.load_model import load_model

BLOCKS, HIDDEN, MLP = 32, 4096, 11008  # of LLaMA-7B
OURS = 3  # how often ours runs for each full SVD


def main() -> None:
    """Run the chosen part."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=PARTS)
    options.add_argument("--rank", type=int, help="[128; of a model: 32]")
    options.add_argument("--device", default="cpu", help="of one matrix")
    options.add_argument("--model", default="smollm2", choices=("smollm2", "7b-block"))
    options.add_argument("--alone", action="store_true", help="leave out PEFT and the full decomposition")
    chosen = options.parse_args()
    chosen.rank = chosen.rank or (32 if chosen.part == "model" else 128)
    print(json.dumps(PARTS[chosen.part](chosen)))


def headline(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the two shapes of LLaMA-7B, Gaussian and Gaussian plus a strong low-rank part."""
    shapes, spectra = ((HIDDEN, HIDDEN), (HIDDEN, MLP)), ("gaussian", "low-rank")
    return [compare(*shape, spectrum, chosen) for shape in shapes for spectrum in spectra]


def llama(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all linear layers of the blocks, each shape once."""
    kinds = {
        "attention (q, k, v, o)": (HIDDEN, HIDDEN, 4),
        "MLP in (gate, up)": (MLP, HIDDEN, 2),
        "MLP out (down)": (HIDDEN, MLP, 1),
    }
    rows: list[dict[str, Any]] = []
    for kind, (out, inn, count) in kinds.items():
        rows.append({"model": "7b", "layer": kind, "count": count * BLOCKS, **compare(out, inn, "gaussian", chosen)})
    total, full = (sum(entry[key] * entry["count"] for entry in rows) for key in ("seconds", "svd"))
    number = sum(entry["count"] for entry in rows)
    rows.append({"model": "7b", "layer": "all", "count": number, "seconds": total, "svd": full, "ratio": full / total})
    return rows


def compare(out: int, inn: int, spectrum: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Time the full SVD and ours of one matrix, ours several times, with a product beside each; return the medians."""
    W = matrix(out, inn, spectrum).to(chosen.device)
    wide = W if W.shape[0] <= W.shape[1] else W.T
    peer, S = timed(lambda: torch.linalg.svd(W, full_matrices=False).S, W.device)
    times, products = [], []
    for _ in range(OURS):
        seconds, found = timed(lambda: decompose(W, chosen.rank), W.device)
        times.append(seconds)
        products.append(timed(lambda: wide @ wide.T, W.device)[0])
    ours = statistics.median(times)
    return {
        "spectrum": spectrum, "shape": f"{out}x{inn}", "rank": chosen.rank, "part": "minor", "method": found.method,
        "seconds": ours, "products": ours / statistics.median(products), "svd": peer, "ratio": peer / ours,
        "true": excess(W, found, S), "certificate": found.excess,
    }  # fmt: skip


def excess(W: Tensor, found: Factors, S: Tensor) -> float:
    """Return by how much the norm of W in the minor space exceeds the exact one; 0 below rounding."""
    tall = W.shape[0] >= W.shape[1]
    held = float(torch.linalg.vector_norm(W @ found.Vh.T if tall else found.U.T @ W, dtype=torch.float64))
    true = float(torch.linalg.vector_norm(S[-len(found.S) :], dtype=torch.float64))
    is_rounding = abs(held - true) <= 5e-7 * float(torch.linalg.vector_norm(W))
    return 0.0 if is_rounding else (held - true) / true


def matrix(out: int, inn: int, spectrum: str) -> Tensor:
    """Return a float32 Gaussian matrix; `low-rank` adds a part of rank 64, with entries 30 times as large."""
    generator = torch.Generator().manual_seed(1)
    strong: Tensor | float = 0.0
    if spectrum == "low-rank":
        left, right = torch.randn(out, 64, generator=generator), torch.randn(64, inn, generator=generator)
        strong = 30 / 8 * left @ right
    return torch.randn(out, inn, generator=generator) + strong


def of_model(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the initial factors of a model; PEFT runs last, because it changes the model."""
    model: Any = load_model("smollm2", dtype=torch.float32)[0] if chosen.model == "smollm2" else block()
    targets = Policy.parse([{"modules": "language", "method": "milora", "rank": chosen.rank, "protect": 0}]).resolve(
        model
    )

    def full() -> None:
        for target in targets:
            torch.linalg.svd(read_matrix(model.get_submodule(target.path)).float(), full_matrices=False)

    with tempfile.TemporaryDirectory() as folder:
        rows, made = zip(
            measured("milora_vl", lambda: initialize(model, targets)),
            measured("milora_vl, filling its cache", lambda: initialize(model, targets, cache_dir=folder)),
            measured("milora_vl, from its cache", lambda: initialize(model, targets, cache_dir=folder)),
            strict=True,
        )
    reports = [initial.report for initial in made[0].values()]
    ways = ", ".join(f"{count} {way}" for way, count in Counter(report.svd for report in reports).items())
    layers = f"{ways}; excess at most {max(report.excess for report in reports):.1e}"
    found = [{**row, "layers": layers} for row in rows]
    if chosen.alone:
        return found
    names = sorted({target.path.rpartition(".")[2] for target in targets})
    config = LoraConfig(r=chosen.rank, target_modules=names, init_lora_weights="pissa")
    warnings.simplefilter("ignore")
    peers = (measured("torch.linalg.svd, each", full), measured("PEFT pissa", lambda: get_peft_model(model, config)))
    return found + [{**row, "layers": str(len(targets))} for row, _ in peers]


def block() -> nn.Module:
    """Return the linear layers of one block of LLaMA-7B with Gaussian weights."""
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN))
    shapes |= {"gate_proj": (HIDDEN, MLP), "up_proj": (HIDDEN, MLP), "down_proj": (MLP, HIDDEN)}
    layers = nn.ModuleDict({name: nn.Linear(*sizes, bias=False) for name, sizes in shapes.items()})
    generator = torch.Generator().manual_seed(1)
    for parameter in layers.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layers


def measured(way: str, work: Work) -> tuple[dict[str, Any], Any]:
    """Return the seconds, with the increase of the memory above the initial use, and the result."""
    reset_peak()
    before = memory()
    seconds, result = timed(work)
    return {"way": way, "seconds": seconds, "grew_mib": (memory("VmHWM") - before) / 2**20}, result


PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "headline": headline, "llama": llama, "model": of_model
}  # fmt: skip

if __name__ == "__main__":
    main()
