"""Adapter folders as the first format wrote them: factors [A; A0] and [B, -B0], and nothing beside milora.json."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from milora_vl.adapter.sidecar import ANCHORS_FILE, FILE_NAME, read_sidecar


def to_version_1(folder: Path) -> None:
    """Rewrite an adapter folder of version 2 in place."""
    sidecar = read_sidecar(folder)
    assert sidecar is not None
    exact = sidecar.read_anchors(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    for path in sidecar.ranks:
        for A_name, B_name in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            keys = [f"base_model.model.{path}.{name}" for name in (A_name, B_name)]
            if keys[0] not in weights:
                continue
            (D, A0), (B, E) = weights[keys[0]].chunk(2), weights[keys[1]].chunk(2, dim=1)
            B0 = exact[path].reshape(B.shape) if path in exact else B - E
            weights[keys[0]] = torch.cat([A0 + D, A0])
            weights[keys[1]] = torch.cat([B, -B0], dim=1)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    data["format_version"] = 1
    del data["anchors"]
    (folder / FILE_NAME).write_text(json.dumps(data), encoding="utf-8")
    (folder / ANCHORS_FILE).unlink(missing_ok=True)
