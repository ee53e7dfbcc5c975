"""What an export is asked for: a form (`--to`) and its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from milora_vl.common.errors import UserError, suggest

if TYPE_CHECKING:
    import torch

FORMS = {
    "adapter": "stock PEFT LoRA on the unchanged base model, with milora.json",
    "merged": "full model, merged in float32 and rounded to the data type of the base or of --dtype",
    "llava": "LoRA folder for load_pretrained_model of haotian-liu/LLaVA",
    "rank-N": "plain LoRA of rank N nearest to the adapter, and its error (rank-r: the r of each module)",
}


@dataclass(frozen=True, slots=True)
class Options:
    """How `export` reads the adapter and writes its form.

    scale: size of the finished update; modules trained in full become W + scale (W' - W). "auto": the smallest that
        keeps 95 % of the fall of the loss on the run's held-out records, measured now.
    base: name, folder or HF id of the base model; by default the model that the adapter names.
    dtype: data type of all written tensors; by default as stored.
    vision_tower: the CLIP model for LLaVA's config.json.
    """

    scale: float | Literal["auto"] = 1.0
    base: str | Path | None = None
    dtype: torch.dtype | None = None
    vision_tower: str | None = None
    allow_base_mismatch: bool = False


def parse_form(to: str) -> tuple[str, int | None]:
    """Return the kind of form and its rank, ("rank", 64) for rank-64; rank-r keeps the r of each module."""
    kind, _, number = to.partition("-")
    if to == "rank-r":
        return "rank", None
    if kind == "rank" and number.isdecimal() and int(number) > 0:
        return "rank", int(number)
    if to not in FORMS or to == "rank-N":
        near = suggest(to, [form for form in FORMS if form != "rank-N"])
        known = f"known forms: {', '.join(FORMS)}   (N is a number: rank-64)"
        hint = f"{known}\ndid you mean {near[0]}?" if near else known
        raise UserError(f"unknown form {to!r}", where="--to", hint=hint)
    return to, None
