"""Convert a DeepSpeed checkpoint of format version 1 after it is loaded: A becomes D = A - A0, B becomes E = B - B0.

DeepSpeed keeps what trains in float32, as flat shards without names, so the A and B of version 1 load into D and E
unnoticed. The moments of Adam need no change: A and D have the same gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milora_vl.adapter.checkpoints import is_sharded
from milora_vl.adapter.errors import AdapterError
from milora_vl.adapter.install import anchors_of, lora_layer, trained_factors
from milora_vl.adapter.layers import TRAINED_1
from milora_vl.adapter.sidecar import Sidecar, read_sidecar


def needs_conversion(checkpoint: Path) -> bool:
    """Return True for a checkpoint folder of DeepSpeed with an adapter of format version 1."""
    sidecar = read_sidecar(checkpoint) if is_sharded(checkpoint) else None
    return sidecar is not None and sidecar.version == 1


@torch.no_grad()
def convert_shards(model: Any, sidecars: Mapping[str, Sidecar]) -> None:
    """Replace A and B by D and E in the float32 shards and in the parameters. All processes must call it.

    `model` is a PeftModel that DeepSpeed has loaded from a checkpoint of format version 1.
    """
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    for adapter, sidecar in sidecars.items():
        for path in sidecar.ranks:
            layer = lora_layer(model, path)
            pairs = zip(trained_factors(layer, adapter), anchors_of(layer, adapter), strict=True)
            for parameter, anchor in pairs:
                difference = safe_get_full_fp32_param(parameter) - anchor.float()
                safe_set_full_fp32_param(parameter, difference)
                with GatheredParameters([parameter], modifier_rank=0):  # does nothing but under ZeRO-3
                    parameter.data.copy_(difference)


def has_shards(parameter: nn.Parameter) -> bool:
    """Return True if a ZeRO optimizer keeps a float32 copy of the parameter in shards."""
    return bool({"ds_id", "_hp_mapping"} & vars(parameter).keys())


def require_no_shards(state: Mapping[str, Any]) -> None:
    """Raise AdapterError for a state dict with the raw names of format version 1, as ZeRO-3 stores them."""
    if any(".lora_" in name and name.endswith(f".{TRAINED_1}") for name in state):
        raise shards_error()


def shards_error() -> AdapterError:
    """Return the error for a DeepSpeed checkpoint of version 1 in training code that does not convert it."""
    return AdapterError(
        "this DeepSpeed checkpoint has adapter format version 1: its optimizer holds A and B instead of differences",
        code="adapter-version-1-shards",
        hint="resume with  python -m milora_vl.train ... --resume_from_checkpoint CHECKPOINT,  which converts it,\n"
        "or start a new run from its adapter:  load_adapter(base, CHECKPOINT, is_trainable=True)",
    )
