"""Error and time of the update's output in three forms that compute the same function, arXiv:2406.09044.

python benchmarks/difference_form.py [--width 1024] [--rank 64] [--tokens 512] [--dtype bfloat16] [--repeats 20]

    difference   s ((B0 + E) D x + E A0 x)          ours: D = A - A0 and E = B - B0 train
    halves       s (B A x - B0 A0 x)                 two products that cancel
    residual     W_p x + s B A x - W x               the paper: W_p = W - s B0 A0, rounded to the dtype of the base

D and E are random, of `share` times the mean size of the entries of A0 and B0. The error is relative to float64, of the
adapter's output before it is added to W x. In the residual form this output is s B A x, computed in half precision,
plus (W_p - W) x in float64: the rounding of W_p counts, the rounding of the product with it does not. Columns:

    autocast     float32 factors under autocast, as HF's Trainer trains
    weights      factors in the half dtype, as DeepSpeed trains; the forms that hold A and B subtract rounded numbers
    stock        the saved LoRA of rank 2r in the half dtype, as a server computes it

Prints one JSON line with the errors by share, and the seconds of forward and backward of the three adapters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from milora_vl.core.adapter.anchored import DifferenceLinear
from milora_vl.core.svd import decompose

SHARES = (1e-3, 1e-2, 1e-1, 1.0)


class Case:
    """A weight (width, width), its minor factors, and a random update of a given size."""

    def __init__(self, width: int, rank: int, tokens: int, dtype: torch.dtype, share: float) -> None:
        random = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.W = (torch.randn(width, width, generator=random) / width**0.5).to(dtype)
        A0, B0 = decompose(self.W.float(), rank, "minor", generator=random).lora(1.0)
        self.A0, self.B0 = A0.to(dtype), B0.to(dtype)
        self.D, self.E = (
            share * start.float().abs().mean() * torch.randn(start.shape, generator=random)
            for start in (self.A0, self.B0)
        )
        self.x = torch.randn(tokens, width, generator=random).to(dtype)

    def exact(self) -> Tensor:
        """Return the output of the update in float64."""
        A0, B0, D, E, x = (t.double() for t in (self.A0, self.B0, self.D, self.E, self.x))
        return x @ ((B0 + E) @ (A0 + D) - B0 @ A0).T


def difference(case: Case, trained: torch.dtype) -> Callable[[], Tensor]:
    """Our layers, with D and E in the dtype `trained`."""
    (r, width), out = case.A0.shape, case.B0.shape[0]
    A = DifferenceLinear.convert(nn.Linear(width, 2 * r, bias=False), 0, case.D.to(trained), case.A0)
    B = DifferenceLinear.convert(nn.Linear(2 * r, out, bias=False), 1, case.E.to(trained), case.B0)
    return lambda: B(A(case.x))


def halves(case: Case, trained: torch.dtype) -> Callable[[], Tensor]:
    """Two products that are subtracted, with A and B in the dtype `trained`."""
    A, B = (nn.Parameter((start.float() + change).to(trained)) for start, change in _pairs(case))
    return lambda: F.linear(F.linear(case.x, A), B) - F.linear(F.linear(case.x, case.A0), case.B0)


def residual(case: Case, trained: torch.dtype) -> Callable[[], Tensor]:
    """The adapter of the paper's residual base, s B A, with A and B in the dtype `trained`."""
    A, B = (nn.Parameter((start.float() + change).to(trained)) for start, change in _pairs(case))
    return lambda: F.linear(F.linear(case.x, A), B)


def stock(case: Case, form: str) -> Tensor:
    """The output of the saved LoRA of rank 2r, in the half dtype, as stock PEFT computes it."""
    A, B = case.A0.float() + case.D, case.B0.float() + case.E
    if form == "difference":
        down, up = torch.cat([case.D, case.A0.float()]), torch.cat([B, case.E], dim=1)
    else:
        down, up = torch.cat([A, case.A0.float()]), torch.cat([B, -case.B0.float()], dim=1)
    return F.linear(F.linear(case.x, down.to(case.dtype)), up.to(case.dtype))


def _pairs(case: Case) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (case.A0, case.D), (case.B0, case.E)


FORMS = {"difference": difference, "halves": halves, "residual": residual}


@torch.no_grad()
def errors(case: Case) -> dict[str, dict[str, float]]:
    """Return the relative error by form and way of computing."""
    exact = case.exact()
    W_p = (case.W.float() - case.B0.float() @ case.A0.float()).to(case.dtype)
    rounded = case.x.double() @ (W_p.double() - case.W.double()).T
    found: dict[str, dict[str, float]] = {}
    for name, form in FORMS.items():
        outputs = {}
        with torch.autocast("cpu", case.dtype):
            outputs["autocast"] = form(case, torch.float32)().double()
        outputs["weights"] = form(case, case.dtype)().double()
        if name == "residual":
            outputs = {way: out + rounded for way, out in outputs.items()}
        else:
            outputs["stock"] = stock(case, name).double()
        found[name] = {way: round(float((out - exact).norm() / exact.norm()), 5) for way, out in outputs.items()}
    return found


def seconds(case: Case, repeats: int) -> dict[str, float]:
    """Return the median time of forward and backward under autocast, measured alternately."""
    runs = {name: form(case, torch.float32) for name, form in FORMS.items()}
    case.x.requires_grad_()
    took: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            with torch.autocast("cpu", case.dtype):
                out = F.linear(case.x, case.W) + run()
            out.float().square().mean().backward()
            if number >= 2:
                took[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in took.items()}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--width", type=int, default=1024)
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    options.add_argument("--repeats", type=int, default=20)
    chosen = options.parse_args()

    def case(share: float) -> Case:
        return Case(chosen.width, chosen.rank, chosen.tokens, getattr(torch, chosen.dtype), share)

    result = {
        **vars(chosen),
        "threads": torch.get_num_threads(),
        "error": {f"{share:g}": errors(case(share)) for share in SHARES},
        "seconds": seconds(case(1e-2), chosen.repeats),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
