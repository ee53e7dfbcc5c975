"""Whether the weights of an adapter folder are those that its milora.json tells of: by names and shapes, unread."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from milora_vl.lora.sidecar import FILE_NAME, AdapterError, Sidecar
from milora_vl.policies.rules import Target

_PREFIX = "base_model.model."


def require_weights(folder: Path, sidecar: Sidecar) -> None:
    """Raise AdapterError for modules without weights (a projector, say), other ranks, and factors of other modules.

    Reads the header of adapter_model.safetensors; a pickled file is PEFT's to check.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, framework="pt") as stored:
        names = set(stored.keys())
        shapes = {name: stored.get_slice(name).get_shape() for name in names if "lora_" in name}
    for target in sidecar.targets:
        missing = _missing(target, names)
        if missing is not None:
            raise AdapterError(
                f"{file} lacks {missing}, which {FILE_NAME} tells of ({target.method}, {target.tower or 'no tower'})\n"
                "is it a checkpoint of code that leaves it out? take the folder that was saved at the end"
            )
        rank = _rank(target, shapes)
        if rank is not None and target.rank is not None and rank != target.rank * (2 if target.has_anchor else 1):
            raise AdapterError(f"{target.path}: {file} has rank {rank}, which is not that of {FILE_NAME}")
    known = tuple(f"{_PREFIX}{target.path}." for target in sidecar.targets)
    others = sorted(name for name in shapes if not name.startswith(known))
    if others:
        raise AdapterError(f"{file} holds {others[0]}, of which {FILE_NAME} does not tell ({len(others):,} such)")


def _missing(target: Target, names: set[str]) -> str | None:
    start = f"{_PREFIX}{target.path}."
    if target.rank is None:
        return None if any(name.startswith(start) for name in names) else target.path
    pairs = (("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B"))
    return next((start + pair[0] for pair in pairs if not {start + name for name in pair} & names), None)


def _rank(target: Target, shapes: dict[str, list[int]]) -> int | None:
    start = f"{_PREFIX}{target.path}."
    return next(
        (shapes[start + name][0] for name in ("lora_A.weight", "lora_embedding_A") if start + name in shapes), None
    )
