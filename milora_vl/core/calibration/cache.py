"""The cache of protected inputs: one file for the weights of a model, its rules and the calibration batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_vl.common.atomic_write import atomic_file
from milora_vl.core.calibration import VERSION
from milora_vl.core.calibration.bases import InputBasis, ProtectedInputs
from milora_vl.core.policy.rules import Target


def cached_inputs(folder: Path, key: str, names: Mapping[str, str]) -> ProtectedInputs | None:
    """Return the entry of a cache, or None if it is missing or damaged. `names` maps paths to names of any layout."""
    path_of = {name: path for path, name in names.items()}
    try:
        with safe_open(_file(folder, key), framework="pt") as stored:
            content = json.loads(stored.metadata()["content"])
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - a method, not a mapping
        bases = [
            InputBasis(tensors[f"{i}.V"], tensors[f"{i}.shares"], tensors.get(f"{i}.held_out"), count)
            for i, count in enumerate(content["num_positions"])
        ]
    except (SafetensorError, OSError, LookupError, ValueError):
        return None
    return ProtectedInputs(bases, {path_of[name]: number for name, number in content["numbers"].items()})


def cache_inputs(folder: Path, key: str, inputs: ProtectedInputs, names: Mapping[str, str]) -> None:
    """Add an entry to a cache. Raises OSError if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "numbers": {names[path]: number for path, number in inputs.numbers.items()},
        "num_positions": [basis.num_positions for basis in inputs.bases],
    }
    tensors = {
        f"{number}.{name}": tensor
        for number, basis in enumerate(inputs.bases)
        for name, tensor in (("V", basis.V), ("shares", basis.shares), ("held_out", basis.held_out_shares))
        if tensor is not None
    }
    with atomic_file(_file(folder, key)) as part:
        save_file(tensors, part, metadata={"content": json.dumps(content)})


def _file(folder: Path, key: str) -> Path:
    return folder / f"calibration-{key}.safetensors"


def calibration_key(model: nn.Module, targets: Sequence[Target], batches: Sequence[Mapping[str, Any]]) -> str:
    """Return a hash of the weights, of the rules that protect inputs, and of the calibration batches."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for target in targets:
        digest.update(f"{target.path} {target.protect}\n".encode())
    content = BytesIO()
    torch.save([dict(batch) for batch in batches], content)
    digest.update(xxhash.xxh3_128_digest(content.getbuffer()))
    digest.update(weights_digest(model).encode())
    return digest.hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """Return a hash of all weights and buffers of a model, and of its config, which decides what they compute."""
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(name.encode() + _digest(tensor))
    if isinstance(model, PreTrainedModel):
        settings = {**model.config.to_dict(), "_name_or_path": None}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous()
    return f"{tuple(values.shape)} {values.dtype}".encode() + xxhash.xxh3_128_digest(
        values.reshape(-1).view(torch.uint8).numpy().data
    )
