"""Files of tensors: weights of any origin, and the cache of initial factors and spectra.

Pickles (.bin, .pt) are read as tensors only, because they can run code. The key of a cached entry is a hash of the
weight's bytes, the rank, the part and the version of the algorithm. A damaged entry is computed again.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from operator import itemgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
import xxhash
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from milora_vl.common.atomic_write import atomic_file
from milora_vl.common.errors import MALFORMED, Problem, UserError
from milora_vl.core.svd import Factors, Part, decompose
from milora_vl.core.weights.distributed import gather_objects, rank_and_world_size

AGAIN = "copy or download the file again, or use a checkpoint of the run"
UNREAD = (SafetensorError, UnpicklingError, RuntimeError, EOFError, *MALFORMED)
"""What safetensors and torch raise for a file that is damaged, of another kind, or holds more than tensors."""


def read_weights(file: Path, *, mmap: bool = False) -> Any:
    """Return the content of a weight file, on the CPU: a dict of tensors, or what `torch.save` has stored.

    With `mmap` the tensors of a pickle are read when they are used, if the format of the file allows it.
    Raises UserError for a file that is damaged, of another kind, or holds more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # PyTorch's first format is no zip file and does not support mmap.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=(mmap and is_zipfile(file)) or None)
    except UNREAD as error:
        raise UserError(problems=[unreadable(file, error)]) from None


def unreadable(file: Path | str, error: BaseException) -> Problem:
    """Return the problem that one of UNREAD means. PyTorch's own text advises to load the file without a check.

    >>> error = UnpicklingError("Weights only load failed. ... Unsupported global: GLOBAL os.system was")
    >>> unreadable("a.bin", error).message
    'holds more than tensors (os.system), so reading it could run code: it was not read'
    """
    text = str(error)  # PyTorch gives no other access to the name of the refused class
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused is not None:
        message = f"holds more than tensors ({refused[1]}), so reading it could run code: it was not read"
        return Problem(message, "weights-unreadable", str(file), "use a .safetensors file, which holds only tensors")
    is_useful = bool(text) and not text.startswith("Weights only load failed")
    reason = text.splitlines()[0] if is_useful else "no file of weights"
    return Problem(f"cannot be read (cut off?): {reason}", "weights-unreadable", str(file), AGAIN)


# Increase this number if the same weight, rank and part can give other factors.
ALGORITHM = 3


def cache_key(W: Tensor, rank: int, part: str, salt: int) -> str:
    """Return the name of the entry for a weight (out, in). `salt` is the seed of a random part."""
    digest = hashlib.sha256(f"{ALGORITHM} {tuple(W.shape)} {W.dtype} {rank} {part} {salt}".encode())
    # A transposed view is hashed in memory order, without a copy.
    values = W.detach().cpu()
    values, order = (values, b"rows") if values.is_contiguous() else (values.T.contiguous(), b"columns")
    digest.update(order + _digest(values))
    return digest.hexdigest()


def cached_factors(W: Tensor, rank: int, part: Part, folder: Path | None, *, seed: int = 0) -> Factors:
    """Return `decompose(W, rank, part)` of W (out, in), from the cache if it has it; `seed` draws a random part.

    Raises ValueError as `decompose`. Warns if the cache cannot be written.
    """
    key = "" if folder is None or W.is_meta else cache_key(W, rank, part, seed)
    tensors, metadata = (read_cached(folder, key) if folder is not None and key else None) or ({}, {})
    with suppress(*MALFORMED):  # an entry that does not fit is written again
        norm, sigma_max, excess = (float(metadata[name]) for name in ("norm", "sigma_max", "excess"))
        U, S, Vh = (tensors[name].to(W.device) for name in ("U", "S", "Vh"))
        found = Factors(U, S, Vh, tensors["index"], norm, sigma_max, excess, metadata["method"])
        is_whole = (*U.shape, *S.shape, *Vh.shape) == (W.shape[0], rank, rank, rank, W.shape[1])
        if is_whole and {U.dtype, S.dtype, Vh.dtype} == {torch.promote_types(W.dtype, torch.float32)}:
            return found
    factors = decompose(W, rank, part, generator=torch.Generator().manual_seed(seed))
    if folder is not None:
        tensors = {name: getattr(factors, name) for name in ("U", "S", "Vh", "index")}
        metadata = {name: str(getattr(factors, name)) for name in ("norm", "sigma_max", "excess", "method")}
        write_cached(folder, key, tensors, metadata)
    return factors


def read_cached(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    try:
        with safe_open(folder / f"{name}.safetensors", framework="pt") as stored:
            return {key: stored.get_tensor(key) for key in list(stored.keys())}, stored.metadata() or {}
    except (SafetensorError, OSError):
        return None


def write_cached(folder: Path, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    try:
        with atomic_file(folder / f"{name}.safetensors") as part:
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, part, metadata=dict(metadata))
    except OSError as error:
        warnings.warn(f"{name} is not cached in {folder}: {error}", stacklevel=3)


def shared_digest(model: nn.Module) -> str:
    """Return the key of the model in the first process, which alone reads its weights. Every process calls this."""
    is_first = rank_and_world_size()[0] == 0
    return str(
        gather_objects(weights_digest(model, reads=is_first) if is_first or is_deepspeed_zero3_enabled() else "")[0]
    )


def weights_digest(model: nn.Module, *, reads: bool = True) -> str:
    """Return the key of a model: a hash of its weights and buffers, its configs, and its adapters unless they are off.

    The layers of PEFT do not change the names of weights, so with adapters off it equals the key of the base alone.
    Under ZeRO-3 one weight is gathered at a time, so every process calls this; the others have no key.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {name: layer for name, layer in inner.named_modules() if isinstance(layer, BaseTunerLayer)}
    on = {name: layer for name, layer in layers.items() if not layer.disable_adapters}
    digest = hashlib.sha256()
    tensors: Iterable[tuple[str, Any]] = chain(inner.named_parameters(), inner.named_buffers())
    for name, tensor in sorted(((_plain_name(name), each) for name, each in tensors), key=itemgetter(0)):
        if not on and ("lora_" in name or ".modules_to_save." in name):
            continue
        with gather_params_ctx([tensor], modifier_rank=None):
            if reads:
                values = tensor.detach().cpu().contiguous()
                digest.update(f"{name}{tuple(values.shape)} {values.dtype}".encode() + _digest(values))
    settings: list[Any] = [
        [name, layer.active_adapters, layer.merged_adapters, vars(layer).get("scaling")]
        for name, layer in sorted(on.items())
    ]
    if isinstance(inner, PreTrainedModel):
        settings.append({**inner.config.to_dict(), "_name_or_path": None})
        settings.append(inner.generation_config and inner.generation_config.to_dict())
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _plain_name(name: str) -> str:
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _digest(tensor: Tensor) -> bytes:
    """Return a fast hash of a contiguous tensor's bytes. It protects against accidents, not against attacks."""
    return xxhash.xxh3_128_digest(tensor.reshape(-1).view(torch.uint8).numpy().data)
