"""How long decompositions wait for weights on the disk, with and without reading one weight ahead.

python benchmarks/read_ahead.py [--weights 4] [--size 1536]   prints a JSON line

The weights are memory-mapped files that the page cache does not hold. The wait is the time to touch all pages of a
weight when its turn comes, in seconds for all weights. TMPDIR must be on a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from milora_vl.factors.read_ahead import one_ahead, read_weights
from milora_vl.svd import decompose


def main() -> None:
    """Measure both ways, in turns, and print the waits."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--weights", type=int, default=4)
    options.add_argument("--size", type=int, default=1536)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.bin" for number in range(chosen.weights)]
        for path in paths:
            torch.randn(chosen.size, chosen.size).numpy().tofile(path)
        waits: dict[str, list[float]] = {"in turn": [], "ahead": []}
        for _ in range(3):
            layers = [_cold(path, chosen.size) for path in paths]
            waits["in turn"].append(_wait(layers))
            layers = [_cold(path, chosen.size) for path in paths]
            waits["ahead"].append(_wait(one_ahead([(layer, layer) for layer in layers])))
    megabytes = chosen.weights * chosen.size**2 * 4 / 1e6
    print(json.dumps({"megabytes": megabytes, **{way: round(min(times), 4) for way, times in waits.items()}}))


def _cold(path: Path, size: int) -> nn.Linear:
    """Return a layer with the weight of a file, which is dropped from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=size * size * 4)
    layer = nn.Linear(size, size, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(0).set_(storage, 0, (size, size)))  # type: ignore[arg-type]
    return layer


def _wait(layers: Iterable[nn.Linear]) -> float:
    """Decompose all weights; return the seconds in which they were read."""
    waited = 0.0
    for layer in layers:
        start = time.perf_counter()
        read_weights(layer)
        waited += time.perf_counter() - start
        decompose(layer.weight.detach(), 16)
    return waited


if __name__ == "__main__":
    main()
