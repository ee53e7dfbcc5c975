"""The plugin of Axolotl 0.19 that makes `adapter: milora` a protected MiLoRA: see examples/axolotl.yaml."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import load_lora
from pydantic import BaseModel

from milora_vl.common.errors import UserError
from milora_vl.interop.replace import get_peft_model_replaced

NAME = "milora"
# Axolotl quantizes for its own adapters alone, and its fused kernels and ReLoRA train or restart both factors.
UNSUPPORTED = ("load_in_4bit", "load_in_8bit", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "relora")


class AddedKeys(BaseModel):
    """Keys that the plugin adds to Axolotl's YAML."""

    milora_protect: float | None = None


class MiloraPlugin(BasePlugin):  # type: ignore[misc]
    """`adapter: milora`, with `lora_r`, `lora_alpha`, `lora_dropout` and the modules of Axolotl's LoRA."""

    def get_input_args(self) -> str:
        return f"{__name__}.{AddedKeys.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=NAME, lora_like=True)]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """Return the model with its adapter, and the LoraConfig; None for the adapters of other plugins.

        Raises UserError for DPO, IPO and KTO, for which Axolotl asks for the LoraConfig alone.
        """
        if cfg.adapter != NAME:
            return None
        if config_only:
            message = "DPO, IPO and KTO get only a LoraConfig from Axolotl, and would train a plain LoRA"
            hint = "train with TRL and  apply_milora  (examples/dpo_trl.py)"
            raise UserError(message, where="rl", hint=hint)
        if refused := [key for key in UNSUPPORTED if cfg[key]]:
            raise UserError("is for Axolotl's own adapters", where=refused[0], hint="remove it, or set  adapter: lora")
        with get_peft_model_replaced("axolotl.loaders.adapter", protect=cfg.milora_protect):
            return load_lora(model, cfg, inference=inference)
