"""Check optional packages before anything is read or loaded: trackers (`--report_to`), bitsandbytes, attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from milora_vl.base.errors import Key, UserError
from milora_vl.cli.command_line import did_you_mean, suggest

# --report_to NAME -> packages; one of them must be importable. pip installs the first.
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
# Other names of Hugging Face; each tracker then says itself what it lacks.
OTHER_TRACKERS = ("all", "none", "azure_ml", "dagshub", "flyte", "kubeflow")
ATTENTION = {"flash_attention_2": ("flash_attn", "flash-attn")}
QUANT = 'pip install "milora-vl[quant]"'


def require_installed(train: Mapping[str, Any], quantization: str, attn_implementation: str) -> None:
    """Raise UserError for the first missing package, with the command to install it or an alternative."""
    named = train.get("report_to") or []
    for name in [named] if isinstance(named, str) else named:
        if name not in TRACKERS and name not in OTHER_TRACKERS:
            raise UserError(
                f"unknown tracker {name}",
                code="flag-value",
                where=Key.of("train.report_to"),
                hint=did_you_mean(suggest(name, TRACKERS)[:1])
                or f"use one of {', '.join([*TRACKERS, *OTHER_TRACKERS])}; report.html shows the losses too",
            )
        if name in TRACKERS and not any(map(_is_installed, TRACKERS[name])):
            raise UserError(
                f"{name} needs the package {TRACKERS[name][0]}, which is not installed",
                code="package-missing",
                where=Key.of("train.report_to"),
                hint=f"pip install {TRACKERS[name][0]}, or --report_to none: report.html shows the losses",
            )
    if train.get("use_liger_kernel") and not _is_installed("liger_kernel"):
        raise UserError(
            "the package liger-kernel is not installed",
            code="package-missing",
            where=Key.of("train.use_liger_kernel"),
            hint="pip install liger-kernel, or remove the flag",
        )
    optim = str(train.get("optim") or "")
    if needs_bitsandbytes(optim) and not _is_installed("bitsandbytes"):
        raise UserError(
            f"{optim} needs the package bitsandbytes, which is not installed",
            code="package-missing",
            where=Key.of("train.optim"),
            hint=f"{QUANT}, or --optim adamw_torch",
        )
    if quantization != "none" and not _is_installed("bitsandbytes"):
        raise UserError(
            "the package bitsandbytes is not installed",
            code="package-missing",
            where=Key.of("quantization"),
            hint=QUANT,
        )
    if attn_implementation in ATTENTION and not _is_installed(ATTENTION[attn_implementation][0]):
        package = ATTENTION[attn_implementation][1]
        raise UserError(
            f"{attn_implementation} needs the package {package}, which is not installed",
            code="package-missing",
            where=Key.of("attn_implementation"),
            hint=f"pip install {package}, or --attn_implementation sdpa",
        )


def needs_bitsandbytes(optim: str) -> bool:
    """Return whether an optimizer name of Hugging Face needs bitsandbytes.

    >>> [needs_bitsandbytes(name) for name in ("paged_adamw_8bit", "adamw_bnb_8bit", "adamw_torch", "adamw_torch_8bit")]
    [True, True, False, False]
    """
    return optim.startswith("paged_") or "bnb" in optim or optim in ("lion_8bit", "ademamix_8bit", "adamw_8bit")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
