"""Optional packages that a recipe's settings need: asked for by name before anything is read or loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from milora_data.command import suggest
from milora_data.errors import UserError

# --report_to NAME -> what to import, any of them; NAME is also what pip installs where nothing else is said.
TRACKERS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "codecarbon": ("codecarbon",),
}
ATTENTION = {"flash_attention_2": ("flash_attn", "flash-attn")}
QUANT = 'pip install "milora-vl[quant]"'


def check(train: Mapping[str, Any], quantization: str, attn_implementation: str) -> None:
    """UserError, with what to install or to say instead, for the first package that is not there."""
    named = train.get("report_to") or []
    for name in [named] if isinstance(named, str) else named:
        near = [] if name in TRACKERS else suggest(name, TRACKERS)
        if near:
            raise UserError(f"--report_to {name}: no such tracker\ndid you mean {near[0]} ?")
        if name in TRACKERS and not any(map(_is_here, TRACKERS[name])):
            raise UserError(
                f"--report_to {name}: the package {TRACKERS[name][0]} is not installed\n"
                f"pip install {TRACKERS[name][0]}, or --report_to none: report.html shows the losses"
            )
    optim = str(train.get("optim") or "")
    if needs_bitsandbytes(optim) and not _is_here("bitsandbytes"):
        raise UserError(f"--optim {optim} needs bitsandbytes: {QUANT}, or --optim adamw_torch")
    if quantization != "none" and not _is_here("bitsandbytes"):
        raise UserError(f"a {quantization} base needs bitsandbytes: {QUANT}")
    if attn_implementation in ATTENTION and not _is_here(ATTENTION[attn_implementation][0]):
        package = ATTENTION[attn_implementation][1]
        raise UserError(f"--attn_implementation {attn_implementation}: pip install {package}, or say sdpa")


def needs_bitsandbytes(optim: str) -> bool:
    """Whether an optimizer of Hugging Face's names is one of bitsandbytes'.

    >>> [needs_bitsandbytes(name) for name in ("paged_adamw_8bit", "adamw_bnb_8bit", "adamw_torch", "adamw_torch_8bit")]
    [True, True, False, False]
    """
    return optim.startswith("paged_") or "bnb" in optim or optim in ("lion_8bit", "ademamix_8bit", "adamw_8bit")


def _is_here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
