"""Check optional packages before anything is read or loaded: trackers (`--report_to`), bitsandbytes, attention."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from milora_vl.base.errors import Key, UserError, first_line
from milora_vl.recipe.schema import Recipe

QUANT = 'pip install "milora-vl[quant]"'


def require_installed(recipe: Recipe) -> None:
    """Raise UserError for the first missing package, with the command to install it or an alternative."""
    train = recipe.train
    _require_trackers(train)
    optim = str(train.get("optim") or "")
    flash = recipe.attn_implementation == "flash_attention_2"
    for is_needed, package, key, hint in (
        (train.get("use_liger_kernel"), "liger_kernel", "train.use_liger_kernel", "pip install liger-kernel"),
        (needs_bitsandbytes(optim), "bitsandbytes", "train.optim", f"{QUANT}, or --optim adamw_torch"),
        (recipe.quantization != "none", "bitsandbytes", "quantization", QUANT),
        (flash, "flash_attn", "attn_implementation", "pip install flash-attn, or --attn_implementation sdpa"),
    ):
        if is_needed and importlib.util.find_spec(package) is None:
            raise UserError(
                f"the package {package} is not installed", code="package-missing", where=Key.of(key), hint=hint
            )


def _require_trackers(train: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown tracker, or one whose package is missing: each callback of HF looks for it."""
    named = train.get("report_to") or []
    trackers = [name for name in ([named] if isinstance(named, str) else named) if name not in ("all", "none")]
    if not trackers:
        return
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(trackers):
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(
            first_line(error),
            code="tracker-unavailable",
            where=Key.of("train.report_to"),
            hint="install it, or use --report_to none: report.html shows the losses",
        ) from None


def needs_bitsandbytes(optim: str) -> bool:
    """Return whether an optimizer name of Hugging Face needs bitsandbytes.

    >>> [needs_bitsandbytes(name) for name in ("paged_adamw_8bit", "adamw_bnb_8bit", "adamw_torch", "adamw_torch_8bit")]
    [True, True, False, False]
    """
    return optim.startswith("paged_") or "bnb" in optim or optim in ("lion_8bit", "ademamix_8bit", "adamw_8bit")
