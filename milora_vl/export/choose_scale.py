"""`export --scale auto`: held-out loss and forgetting at several scales of an update, and the one to write."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from milora_data.check import read_training_records
from milora_data.keys import file_key
from milora_vl.common.atomic_write import write_json
from milora_vl.common.errors import UserError
from milora_vl.core.adapter.folders import ADAPTER_FILES, recipe_of_run
from milora_vl.export.request import Options
from milora_vl.forgetting.measure import measure_forgetting
from milora_vl.interop.load_model import load_any, require_scalable
from milora_vl.interop.scale import Update
from milora_vl.models.base import load_processor, split_processor
from milora_vl.models.collator_for import collator_for
from milora_vl.models.devices import device_named
from milora_vl.models.loading import load_weights
from milora_vl.models.losses import record_losses
from milora_vl.models.prompts import prompts_of

MEASURED = (0.0, 0.25, 0.4, 0.6, 0.8, 1.0)
KEPT = 0.95  # share of the largest fall of the held-out loss


def measure_scales(folder: Path, base: str, options: Options) -> dict[str, Any]:
    """Write scales.json into the folder of an adapter and return it; `chosen` is the smallest scale that keeps `KEPT`.

    By scale: mean loss of the run's held-out records, and KL from the base on general text, in nats per token. The fall
    counts to the lowest loss, of any scale. Raises UserError without held-out records, a scale or a fall.
    """
    data = recipe_of_run(folder).get("data") or {}
    if not data.get("eval_path"):
        hint = "train with  --eval_data_path FILE,  or give a number:  --scale 0.7"
        raise UserError("auto: the run has no held-out records", code="scale-no-held-out", where="--scale", hint=hint)
    read: dict[str, Any] = {key: data[key] for key in ("image_folder", "bad_images") if key in data}
    records = read_training_records(data["eval_path"], limit=data.get("limit"), **read).train
    device, processor, prompts = device_named(None), load_processor(base), prompts_of(base, folder)
    model = load_weights(base, torch.float32 if device.type == "cpu" else None, device=device)
    require_scalable(model, folder)
    tuned = load_any(model, folder, allow_base_mismatch=options.allow_base_mismatch).to(device).eval()
    prompts.limit(processor)
    read |= {"template": prompts.template, "image_aspect_ratio": prompts.image_aspect_ratio}
    collate = collator_for(tuned, processor, max_length=data.get("max_length"), **read)
    update, curve, losses = Update(tuned), list[dict[str, float]](), list[float]()
    for scale in MEASURED:
        update.set(scale)
        losses = [loss for _, loss in record_losses(tuned, collate, records, 8)]
        forgotten = measure_forgetting(tuned, split_processor(processor)[0])
        curve.append({"scale": scale, "held_out_loss": fmean(losses), "forgetting": forgotten.kl})
    before, lowest = curve[0]["held_out_loss"], min(point["held_out_loss"] for point in curve)
    kept = [point["scale"] for point in curve[1:] if before - point["held_out_loss"] >= KEPT * (before - lowest)]
    content: dict[str, Any] = {
        "chosen": kept[0] if lowest < before else None,
        "num_records": len(losses),
        "scales": curve,
        "adapter": file_key(folder / ADAPTER_FILES[0]),
    }
    write_json(folder / "scales.json", content)
    if content["chosen"] is None:
        raise UserError(f"auto: no scale lowers the loss of {before:.4f}", where="--scale", hint="give a number")
    return content
