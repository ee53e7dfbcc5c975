"""The arms: PEFT's own experiments by the name of their folder, and policies of ours on the modules of its LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

LORA, OSF = "lora/llama-3.2-3B-rank32", "osf/llama-3.2-3B-rank128"
# PEFT's other adapters with one fixed factor. The table has their published results; as arms they run too.
FIXED = ("lora/llama-3.2-3B-rank32-lorafa", "lora/llama-3.2-3B-rank32-mica")
OURS: Mapping[str, Mapping[str, Any]] = {
    "gradient": {"method": "gradient", "protect": 0.95},  # our default
    "milora-protected": {"method": "milora", "protect": 0.95},
    "milora": {"method": "milora"},  # as in the paper
}
ARMS = (LORA, *OURS, OSF)


def rules(arm: str, model: nn.Module, lora: LoraConfig) -> list[dict[str, Any]]:
    """Return the policy of one of our arms: the modules and the trained parameters of PEFT's LoRA.

    `milora` has the rank of the LoRA and scale 1, as in the paper's table of settings. The others train one factor, so
    at equal trained parameters their rank is larger (80 for rank 32 on Llama-3.2-3B); their scale is the LoRA's.
    """
    kind: str = model.config.model_type  # type: ignore[assignment, union-attr]
    names = sorted(lora.target_modules or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind])
    method = OURS[arm]
    rank, alpha = lora.r, float(lora.r)
    if "protect" in method:
        paths = [module for path, module in model.named_modules() if path.rpartition(".")[2] in names]
        outputs = sum(module.weight.shape[0] for module in paths)  # type: ignore[index, union-attr, misc]
        both = sum(sum(module.weight.shape) for module in paths)  # type: ignore[arg-type, union-attr, misc]
        rank = lora.r * both // outputs
        alpha = rank * lora.lora_alpha / lora.r
    return [{"modules": f"*.{name}", **method, "rank": rank, "alpha": alpha} for name in names]
