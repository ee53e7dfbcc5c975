"""Cache initial factors and spectra on disk, so that a second run with the same weights does not decompose them again.

The key is a hash of the weight's bytes, the rank, the part and the version of the algorithm. A damaged entry is
computed again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from milora_vl.common.atomic_write import atomic_file
from milora_vl.core.svd import Factors, singular_values

# Increase this number if the same weight, rank and part can give other factors.
ALGORITHM = 2
_TENSORS = ("U", "S", "Vh", "index")


def cache_key(W: Tensor, rank: int, part: str, salt: int) -> str:
    """Return the name of the entry for a weight (out, in). `salt` is the seed of a random part."""
    digest = hashlib.sha256(f"{ALGORITHM} {tuple(W.shape)} {W.dtype} {rank} {part} {salt}".encode())
    # A transposed view is hashed in memory order, without a copy.
    values = W.detach().cpu()
    values, order = (values, b"rows") if values.is_contiguous() else (values.T.contiguous(), b"columns")
    digest.update(order + _digest(values))
    return digest.hexdigest()


def read_factors(folder: Path, key: str) -> Factors | None:
    """Return a stored entry, or None if it is missing or damaged."""
    entry = _read(folder, key, _TENSORS)
    if entry is None:
        return None
    tensors, metadata = entry
    norm, sigma_max, excess = (float(metadata[name]) for name in ("norm", "sigma_max", "excess"))
    return Factors(**tensors, norm=norm, sigma_max=sigma_max, excess=excess, method=metadata["method"])


def write_factors(folder: Path, key: str, factors: Factors) -> None:
    """Store an entry atomically. Warns if it cannot be written."""
    tensors = {name: getattr(factors, name).cpu().contiguous() for name in _TENSORS}
    metadata = {name: str(getattr(factors, name)) for name in ("norm", "sigma_max", "excess", "method")}
    _write(folder, key, tensors, metadata)


def cached_singular_values(W: Tensor, folder: Path | None) -> Tensor:
    """Return all singular values of W (out, in), descending, on the CPU, from the cache if it has them.

    Raises ValueError for NaN and infinite values. Warns if the cache cannot be written.
    """
    if folder is None:
        return singular_values(W).cpu()
    key = cache_key(W, min(W.shape), "values", 0)
    entry = _read(folder, key, ("S",))
    if entry is not None:
        return entry[0]["S"]
    values = singular_values(W).cpu()
    _write(folder, key, {"S": values}, {})
    return values


def _read(folder: Path, key: str, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    try:
        with safe_open(folder / f"{key}.safetensors", framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in names}, stored.metadata() or {}
    except (SafetensorError, OSError):  # none, or damaged
        return None


def _write(folder: Path, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    try:
        with atomic_file(folder / f"{key}.safetensors") as part:
            save_file(dict(tensors), part, metadata=dict(metadata))
    except OSError as error:
        warnings.warn(f"factors are not cached in {folder}: {error}", stacklevel=3)


def _digest(tensor: Tensor) -> bytes:
    """Return a fast hash of a contiguous tensor's bytes. It protects against accidents, not against attacks."""
    return xxhash.xxh3_128_digest(tensor.reshape(-1).view(torch.uint8).numpy().data)
