"""Check optional packages before anything is read or loaded: trackers (`--report_to`), bitsandbytes, attention."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from milora_vl.common.cli.command_line import did_you_mean, suggest
from milora_vl.common.errors import Key, UserError, first_line
from milora_vl.train.recipe.schema import Recipe

# Attention implementations and their packages on the index. Versions 2 and 4 share the module flash_attn.
FLASH_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}
QUANT = "pip install -e '.[quant]'"


def require_installed(recipe: Recipe) -> None:
    """Raise UserError for the first missing package, with the command to install it or an alternative."""
    train = recipe.train
    _require_trackers(train)
    optim = str(train.get("optim") or "")
    _require_attention(recipe)
    for is_needed, package, key, hint in (
        (train.get("use_liger_kernel"), "liger_kernel", "train.use_liger_kernel", "pip install liger-kernel"),
        (needs_bitsandbytes(optim), "bitsandbytes", "train.optim", f"{QUANT}, or --optim adamw_torch"),
        (recipe.quantization != "none", "bitsandbytes", "quantization", QUANT),
        (train.get("deepspeed"), "deepspeed", "train.deepspeed", "pip install -e '.[deepspeed]', or --deepspeed \"\""),
    ):
        if is_needed and importlib.util.find_spec(package) is None:
            raise UserError(
                f"the package {package} is not installed", code="package-missing", where=Key.of(key), hint=hint
            )


def _require_attention(recipe: Recipe) -> None:
    """Raise UserError for a name that transformers does not know, or whose package is missing.

    transformers takes the kernel of a missing FlashAttention from the hub if the package kernels is installed.
    """
    from transformers import AttentionInterface

    known = ["eager", *(name for name in AttentionInterface().valid_keys() if "|" not in name)]
    for name in (recipe.attention_of("language"), recipe.attention_of("vision")):
        is_of_hub = re.fullmatch(r"[^/:\s]+/[^/:\s]+(:[^/:\s]+)?", name) is not None
        if name not in known and not is_of_hub:
            raise UserError(
                f"unknown attention implementation {name!r}. transformers {version('transformers')} knows "
                f"{', '.join(sorted(known))}, and kernels of the hub (OWNER/NAME)",
                code="attention-unknown",
                where=Key.of("attn_implementation"),
                hint=did_you_mean(suggest(name, known)) or "use sdpa",
            )
        package = "kernels" if is_of_hub else FLASH_PACKAGES.get(name, "torch")
        if not (_is_installed(package) or _is_installed("kernels")):
            raise UserError(
                f"{name} needs the package {package}, which is not installed",
                code="package-missing",
                where=Key.of("attn_implementation"),
                hint=f"pip install {package}, or pip install kernels, or --attn_implementation sdpa",
            )


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


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
