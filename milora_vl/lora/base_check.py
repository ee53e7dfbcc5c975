"""Whether an adapter on disk fits: the model has its modules, the base weights are those it was made for."""

from __future__ import annotations

import logging
from pathlib import Path

from peft import PeftModel
from torch import nn

from milora_vl.lora.errors import AdapterError
from milora_vl.lora.install import base_layer
from milora_vl.lora.sidecar import FILE_NAME, Sidecar, locate
from milora_vl.towers import canonical_names, keep_weights_readable
from milora_vl.weights.fingerprint import QUANTIZED_EPS, distance
from milora_vl.weights.matrices import read_matrix

logger = logging.getLogger(__name__)


def fitted(model: nn.Module, sidecar: Sidecar, *, allow_base_mismatch: bool) -> Sidecar:
    """Return the sidecar with the module paths of `model`, after comparing the fingerprint with its weights.

    Raises AdapterError for modules that are missing and, unless allowed, for weights that differ.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    require_readable(base)
    found = locate(sidecar, canonical_names(base))
    if not allow_base_mismatch:
        _require_base(base, found)
    return found


def _require_base(base: nn.Module, sidecar: Sidecar) -> None:
    layers = {path: base_layer(base, path) for path in sidecar.sketches}
    if any(precision(layer) for layer in layers.values()):
        logger.warning("this base is quantised: only a clearly different model can be told from the right one")
    apart = {
        path: distance(s, read_matrix(layers[path]), precision(layers[path])) for path, s in sidecar.sketches.items()
    }
    wrong = sorted((path for path in apart if apart[path] > 1), key=lambda path: -apart[path])
    if wrong:
        raise AdapterError(
            f"this is not the base model that the adapter was made for: {len(wrong):,} of {len(apart):,} weights "
            f"differ,\nmost of all {wrong[0]} ({apart[wrong[0]]:.0f} times what rounding explains)\n"
            "load the right base, or pass allow_base_mismatch=True (--allow-base-mismatch)"
        )


def precision(layer: nn.Module) -> float:
    """Return the relative precision of a quantised weight; 0 for a plain one, whose dtype tells."""
    return QUANTIZED_EPS.get(layer.get_parameter("weight").dtype, 0.0)


def require_readable(base: nn.Module) -> None:
    """Raise AdapterError where bitsandbytes has repacked 4-bit weights, so that they cannot be read any more."""
    repacked = keep_weights_readable(base)
    if repacked:
        raise AdapterError(
            f"{repacked[0]}: a forward in eval mode has repacked this 4-bit weight ({len(repacked):,} in all)\n"
            "bitsandbytes cannot dequantise it any more: load the base again, and add the adapter before any forward"
        )


def require_same_kind(folder: Path, found: Sidecar | None, expected: Sidecar) -> None:
    """Raise AdapterError unless the adapter in `folder` has the modules and ranks of the one it is to replace."""
    if found is None:
        raise AdapterError(
            f"{folder} has no {FILE_NAME}: a plain LoRA would replace the anchor of this adapter\n"
            "load it under another adapter name, or into the base model"
        )
    there = {found.names[path]: rank for path, rank in found.ranks.items()}
    here = {expected.names[path]: rank for path, rank in expected.ranks.items()}
    differ = sorted(name for name in there | here if there.get(name) != here.get(name))
    if differ:
        raise AdapterError(
            f"{folder} does not fit this adapter: {len(differ):,} modules differ,\n"
            f"first {differ[0]}: rank {there.get(differ[0])} there, {here.get(differ[0])} here"
        )
