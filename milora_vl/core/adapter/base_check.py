"""Check that an adapter on disk fits a model: its modules exist, and the base weights are the ones it was made for."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from milora_vl.core.adapter.errors import AdapterError
from milora_vl.core.adapter.install import base_layer, base_model_of
from milora_vl.core.adapter.sidecar import FILE_NAME, Sidecar, locate
from milora_vl.core.policy.towers import canonical_names, keep_weights_readable
from milora_vl.core.weights.fingerprint import QUANTIZED_EPS, distance
from milora_vl.core.weights.matrices import read_matrix

logger = logging.getLogger(__name__)


def fitted(model: nn.Module, sidecar: Sidecar, *, allow_base_mismatch: bool) -> Sidecar:
    """Return the sidecar with the module paths of `model`, after comparing its fingerprints with the weights.

    Raises AdapterError for missing modules and, without `allow_base_mismatch`, for weights that differ.
    """
    base = base_model_of(model)
    require_readable(base)
    located = locate(sidecar, canonical_names(base))
    if not allow_base_mismatch:
        _require_base(base, located)
    return located


def _require_base(base: nn.Module, sidecar: Sidecar) -> None:
    layers = {path: base_layer(base, path) for path in sidecar.fingerprints}
    if any(precision(layer) for layer in layers.values()):
        logger.warning("The base model is quantized: the check finds only a clearly different base model.")
    distances = {
        path: distance(saved, read_matrix(layers[path]), precision(layers[path]))
        for path, saved in sidecar.fingerprints.items()
    }
    # A distance of 1 is what rounding to half precision explains.
    wrong = sorted((path for path in distances if distances[path] > 1), key=lambda path: -distances[path])
    if wrong:
        raise AdapterError(
            f"this is not the base model that the adapter was made for: {len(wrong):,} of {len(distances):,} weights "
            f"differ, this one most ({distances[wrong[0]]:.0f} times what rounding explains)",
            code="adapter-wrong-base",
            where=wrong[0],
            hint="load the base model that adapter_config.json names; export, analyze and load_adapter can skip this "
            "check (allow_base_mismatch)",
        )


def precision(layer: nn.Module) -> float:
    """Return the relative precision of a quantized weight; 0 for others, whose dtype determines it."""
    return QUANTIZED_EPS.get(layer.get_parameter("weight").dtype, 0.0)


def require_readable(base: nn.Module) -> None:
    """Raise AdapterError if bitsandbytes has repacked 4-bit weights, which makes them unreadable."""
    repacked = keep_weights_readable(base)
    if repacked:
        raise AdapterError(
            f"a forward pass in eval mode has repacked this 4-bit weight ({len(repacked):,} in total); "
            "bitsandbytes cannot dequantize it any more",
            code="adapter-repacked-weights",
            where=repacked[0],
            hint="reload the base model and add the adapter before any forward pass",
        )


def require_same_kind(folder: Path, saved: Sidecar | None, expected: Sidecar) -> None:
    """Raise AdapterError unless the adapter in `folder` has the same modules and ranks as the loaded one."""
    if saved is None:
        raise AdapterError(
            f"has no {FILE_NAME}: a plain LoRA would replace the anchor of this adapter",
            code="adapter-plain-lora",
            where=str(folder),
            hint="load it under another adapter name, or into the base model",
        )
    saved_ranks = {saved.names[path]: rank for path, rank in saved.ranks.items()}
    ranks = {expected.names[path]: rank for path, rank in expected.ranks.items()}
    differ = sorted(name for name in saved_ranks | ranks if saved_ranks.get(name) != ranks.get(name))
    if differ:
        raise AdapterError(
            f"the saved adapter differs from the loaded one in {len(differ):,} modules, first {differ[0]}: saved rank "
            f"{saved_ranks.get(differ[0])}, loaded rank {ranks.get(differ[0])}",
            code="adapter-rank-mismatch",
            where=str(folder),
            hint="load it under another adapter name, or into the base model",
        )
