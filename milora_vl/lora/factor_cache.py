"""Factors on disk, so that a second run with the same weights does not decompose them again.

The key is a hash of the weight's bytes, the rank, the part and the version of the algorithm. A damaged entry is made
anew.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from milora_vl.svd import Factors

# Raise it when the same weight, rank and part may give other factors.
ALGORITHM = 1
_TENSORS = ("U", "S", "Vh", "spectrum", "index")


def cache_key(W: Tensor, rank: int, part: str, salt: int) -> str:
    """Return the name of the entry for a weight (out, in); `salt` tells random parts of equal weights apart."""
    digest = hashlib.sha256(f"{ALGORITHM} {tuple(W.shape)} {W.dtype} {rank} {part} {salt}".encode())
    digest.update(W.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_factors(folder: Path, key: str) -> Factors | None:
    """Return a stored entry, None where there is none or it is damaged."""
    file = folder / f"{key}.safetensors"
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in _TENSORS}
            metadata = stored.metadata()
            return Factors(**tensors, excess=float(metadata["excess"]), method=metadata["method"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def write_factors(folder: Path, key: str, factors: Factors) -> None:
    """Store an entry; another process sees it whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "U": factors.U, "S": factors.S, "Vh": factors.Vh, "spectrum": factors.spectrum, "index": factors.index
    }  # fmt: skip
    part = folder / f".{key}.{os.getpid()}"
    metadata = {"excess": repr(factors.excess), "method": factors.method}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)
    part.replace(folder / f"{key}.safetensors")
