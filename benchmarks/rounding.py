"""The share of rounding noise in the minor part of smol-llava's weights, and the same rounding applied to MiniLM-L6.

python benchmarks/rounding.py [--docs docs/studies]

smol-llava's language model is stored as Q4_1: blocks of 32 weights with 16 levels at distance d. The error of a weight
is at most d/2, with variance d^2/12. The unrounded weights are not available here. Two measurements:

- expected: the energy of new noise with these variances in the last `rank` left singular directions of the stored
  weight, E ||U'N||^2 = sum_ij var_ij (sum_k U_ik^2), and on both sides, E ||U'NV||^2, divided by the weight's energy;
- observed: MiniLM-L6's float32 weights are rounded in this way, and their minor subspaces are compared before and after
  (similarity ||U'U~||^2 / rank of the left vectors: 1 for equal subspaces, rank/out for random ones).

Prints a table and writes rounding.csv with one row per matrix.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from torch import Tensor

from milora_data.assets import fetch
from milora_vl.models.smol_llava import GGUF
from milora_vl.report.tables import Table
from studies.page import markdown, with_block

Q4_1 = GGMLQuantizationType.Q4_1
BLOCK, BYTES = 32, 20  # weights per block; bytes: scale and minimum as float16, then 16 bytes of levels
KINDS = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "ffn_gate": "gate", "ffn_up": "up",
    "ffn_down": "down", "query": "q", "key": "k", "value": "v", "attention.output.dense": "o",
    "intermediate.dense": "up", "output.dense": "down",
}  # fmt: skip
ATTENTION = ("q", "k", "v", "o")
MODELS = {"smollm2": "SmolLM2-135M, as stored", "minilm": "MiniLM-L6, rounded by us"}


def variances(stored: np.ndarray) -> Tensor:
    """Return the variance of the rounding error of each weight (out, in), from the bytes of Q4_1 blocks."""
    steps = stored.reshape(stored.shape[0], -1, BYTES)[..., :2].copy().view(np.float16)[..., 0]
    return torch.from_numpy(steps.astype(np.float64)).square().div(12).repeat_interleave(BLOCK, dim=1)


def row(model: str, name: str, stored: np.ndarray, rank: int, exact: Tensor | None) -> dict[str, Any]:
    """One matrix: relative noise, noise over energy in the minor subspace, and the similarity of the subspaces."""
    weight = torch.from_numpy(quants.dequantize(stored, Q4_1)).double()
    variance = variances(stored)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    left, right = U[:, -rank:].square().sum(1), Vh[-rank:].square().sum(0)
    kind = next(short for part, short in KINDS.items() if part in name)
    found: dict[str, Any] = {
        "model": model, "matrix": name, "kind": kind,
        "noise": float((variance.sum() / weight.square().sum()).sqrt()),
        "noise_left": float(left @ variance.sum(1) / S[-rank:].square().sum()),
        "noise_both": float(left @ variance @ right / S[-rank:].square().sum()),
    }  # fmt: skip
    if exact is not None:
        before = torch.linalg.svd(exact.double(), full_matrices=False)[0][:, -rank:]
        found["noise_seen"] = float((weight - exact).norm() / exact.norm())
        found["similarity"] = float((before.T @ U[:, -rank:]).square().sum() / rank)
        found["of_random"] = rank / len(U)
    return found


def smollm2(rank: int) -> Iterator[dict[str, Any]]:
    """Return the stored matrices of the language model."""
    for tensor in GGUFReader(next(fetch("smollm2").rglob(GGUF))).tensors:
        if tensor.tensor_type == Q4_1:
            yield row("smollm2", tensor.name, tensor.data, rank, None)


def minilm(rank: int) -> Iterator[dict[str, Any]]:
    """Return the rounded matrices of the encoder."""
    from transformers import AutoModel

    for name, module in AutoModel.from_pretrained(fetch("minilm")).encoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            exact = module.weight.detach()
            yield row("minilm", name, quants.quantize(exact.numpy(), Q4_1), rank, exact)


def table(rows: list[dict[str, Any]], rank: int) -> Table:
    """Return medians and ranges by model and kind of matrix."""
    lines = []
    for model, label in MODELS.items():
        for kind in dict.fromkeys(KINDS.values()):
            own = [r for r in rows if r["model"] == model and r["kind"] == kind]
            if own:
                part = "attention" if kind in ATTENTION else "MLP"
                lines.append((label, part, kind, str(len(own)), *(_spread(own, c) for c in _COLUMNS)))
    header = (
        "model",
        "part",
        "matrix",
        "n",
        "noise / ‖W‖",
        f"noise / energy, last {rank} left",
        "both sides",
        "similarity",
    )
    return Table(header, tuple(lines), "Median over layers, smallest and largest in brackets.")


_COLUMNS = ("noise", "noise_left", "noise_both", "similarity")


def _spread(rows: list[dict[str, Any]], column: str) -> str:
    values = [float(r[column]) for r in rows if r.get(column) not in (None, "")]
    if not values:
        return "–"
    text = f"{median(values):.2g}"
    return text if min(values) == max(values) else f"{text} ({min(values):.2g} to {max(values):.2g})"


def main() -> None:
    """Measure, print, and write the files if requested."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--docs", type=Path)
    given = options.parse_args()
    rows = [*smollm2(given.rank), *minilm(given.rank)]
    found = table(rows, given.rank)
    print(f"{markdown(found)}\n\n{found.caption}")
    if given.docs is not None:
        columns = list(dict.fromkeys(key for r in rows for key in r))
        with (given.docs / "rounding.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        page = given.docs / "rounding.md"
        page.write_text(with_block(page.read_text(encoding="utf-8"), "rounding", found), encoding="utf-8")


if __name__ == "__main__":
    main()
