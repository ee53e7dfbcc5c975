"""Save, load and cache protected inputs (protected_inputs-*.safetensors); checkpoints refer to them by a content hash.

The directions are stored and not found again, because sampled text and an energy share without a gap are not
reproducible on another device.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from milora_vl.base.atomic_write import atomic_file
from milora_vl.calibration import VERSION
from milora_vl.calibration.bases import CalibrationError, InputBasis, ProtectedInputs
from milora_vl.policy.rules import Target


def file_name(digest: str) -> str:
    """Return the name of the file with this hash."""
    return f"protected-inputs-{digest}.safetensors"


def home_of(folder: Path) -> Path:
    """Return the folder that holds the file of an adapter folder: the run, for a checkpoint of a run."""
    return folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder


def write_inputs(folder: Path, inputs: ProtectedInputs, names: Mapping[str, str]) -> Path:
    """Write the file unless `folder` has it, and return its path. `names` maps module paths to layout-independent
    names.

    Raises OSError if it cannot be written.
    """
    file = folder / file_name(inputs.digest)
    if not file.is_file():
        _write(file, inputs, names)
    return file


def _write(file: Path, inputs: ProtectedInputs, names: Mapping[str, str]) -> None:
    content = {
        "numbers": {names[path]: number for path, number in inputs.numbers.items()},
        "bases": [
            {"size": b.size, "share": b.share, "held_out": b.held_out, "num_positions": b.num_positions}
            for b in inputs.bases
        ],
    }
    tensors = {str(number): basis.V.detach().cpu().contiguous() for number, basis in enumerate(inputs.bases)}
    with atomic_file(file) as part:
        save_file(tensors, part, metadata={"content": json.dumps(content)})


def read_inputs(folder: Path, digest: str, names: Mapping[str, str]) -> ProtectedInputs:
    """Return the protected inputs with this hash, from an adapter folder or the run it belongs to.

    Raises CalibrationError if the file is missing, damaged, or from another model.
    """
    homes = dict.fromkeys((folder, home_of(folder), folder.parent))
    file = next((home / file_name(digest) for home in homes if (home / file_name(digest)).is_file()), None)
    if file is None:
        raise CalibrationError(
            f"{file_name(digest)} is missing; it holds the protected inputs of this adapter",
            code="protect-missing-file",
            where=str(folder),
            hint="copy it from the output_dir of the run that wrote the adapter; inference and merging do not need it",
        )
    return _read(file, names)


def _read(file: Path, names: Mapping[str, str]) -> ProtectedInputs:
    path_of = {name: path for path, name in names.items()}
    try:
        with safe_open(file, framework="pt") as stored:
            content = json.loads(stored.metadata()["content"])
            # Clones are aligned in memory as the originals were: a resumed run then rounds like an uninterrupted one.
            bases = [InputBasis(stored.get_tensor(str(i)).clone(), **b) for i, b in enumerate(content["bases"])]
            numbers = {str(name): range(len(bases))[number] for name, number in content["numbers"].items()}
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CalibrationError(
            f"the file is damaged ({type(error).__name__}: {error})",
            code="protect-damaged-file",
            where=str(file),
            hint="restore the file from the output_dir of the run, or remove it from the cache",
        ) from error
    missing = [name for name in numbers if name not in path_of]
    if missing:
        raise CalibrationError(
            f"the protected inputs belong to another model: this one has no module {missing[0]}",
            code="protect-other-model",
            where=str(file),
            hint="load the base model of the run",
        )
    return ProtectedInputs(bases, {path_of[name]: number for name, number in numbers.items()})


def require_shapes(inputs: ProtectedInputs, targets: Sequence[Target]) -> None:
    """Raise CalibrationError unless every target with protected inputs has a basis of its input size."""
    for target in targets:
        if target.protect is None:
            continue
        size = inputs.of(target.path).size if target.path in inputs.numbers else None
        if size != target.shape[1]:
            raise CalibrationError(
                f"the protected inputs belong to another model: they have {size or 'no'} directions for this layer, "
                f"which has {target.shape[1]} inputs",
                code="protect-other-model",
                where=target.path,
                hint="calibrate this model",
            )


def cached_inputs(folder: Path, key: str, names: Mapping[str, str]) -> ProtectedInputs | None:
    """Return the entry of a cache, or None if it is missing or damaged."""
    file = folder / f"calibration-{key}.safetensors"
    if not file.is_file():
        return None
    try:
        return _read(file, names)
    except CalibrationError:
        return None


def cache_inputs(folder: Path, key: str, inputs: ProtectedInputs, names: Mapping[str, str]) -> None:
    """Add an entry to a cache. Raises OSError if it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"calibration-{key}.safetensors", inputs, names)


def calibration_key(model: nn.Module, targets: Sequence[Target], batches: Sequence[Mapping[str, Any]]) -> str:
    """Return a hash of the weights, of the rules that protect inputs, and of the calibration batches."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    for target in targets:
        if target.protect is not None:
            digest.update(f"{target.path} {target.protect.inputs} {target.protect.max}\n".encode())
    content = BytesIO()
    torch.save([dict(batch) for batch in batches], content)
    digest.update(xxhash.xxh3_128_digest(content.getbuffer()))
    digest.update(weights_digest(model).encode())
    return digest.hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """Return a hash of all weights of a model."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + _digest(parameter))
    return digest.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous()
    return f"{tuple(values.shape)} {values.dtype}".encode() + xxhash.xxh3_128_digest(
        values.reshape(-1).view(torch.uint8).numpy().data
    )
