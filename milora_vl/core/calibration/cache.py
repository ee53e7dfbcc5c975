"""The cache of what a calibration chose: one file for the weights of a model, its rules, and the batches."""

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
from peft.utils.integrations import gather_params_ctx
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_vl.common.atomic_write import atomic_file
from milora_vl.core.calibration import VERSION
from milora_vl.core.calibration.bases import Calibration, sources_of
from milora_vl.core.policy.rules import Target


def read_entry(folder: Path, key: str) -> tuple[dict[str, Tensor], Any] | None:
    """Return the tensors and the JSON content of an entry; None if it is missing or damaged."""
    try:
        with safe_open(_file(folder, key), framework="pt") as stored:
            names = list(stored.keys())
            return {name: stored.get_tensor(name) for name in names}, json.loads(stored.metadata()["content"])
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        return None


def write_entry(folder: Path, key: str, tensors: Mapping[str, Tensor], content: object) -> None:
    """Add an entry atomically. Raises OSError if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(_file(folder, key)) as part:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, part, metadata={"content": json.dumps(content)})


def _file(folder: Path, key: str) -> Path:
    return folder / f"calibration-{key}.safetensors"


def calibration_key(model: nn.Module, targets: Sequence[Target], calibration: Calibration | None) -> str:
    """Return a hash of all that decides a fixed A: weights, rules and calibration. Every process calls this."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for t in targets:
        digest.update(f"{t.path} {t.tower} {t.method} {t.rank} {t.seed} {t.sigma} {t.protect}\n".encode())
    content = BytesIO()
    sources = [] if calibration is None else sources_of(calibration)
    torch.save([[dict(batch) for batch in part] for part in sources], content)
    digest.update(xxhash.xxh3_128_digest(content.getbuffer()))
    digest.update(weights_digest(model).encode())
    return digest.hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """Return a hash of all weights and buffers of a model, and of its config, which decides what they compute.

    Under ZeRO-3 one weight is gathered at a time, so every process calls this.
    """
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        with gather_params_ctx([tensor], modifier_rank=None):
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
