"""A base with an adapter as a model of VLMEvalKit: `register` adds it to the dict of models, as there is no hook."""

from __future__ import annotations

import importlib
from typing import Any

from milora_data.records.record import Turn
from milora_vl.common.errors import UserError
from milora_vl.interop.load_model import load_model
from milora_vl.models.generate import Prompt, generate


def register(name: str, model: str, adapter: str | None = None, *, template: str = "vicuna_v1") -> None:
    """Register base + adapter with VLMEvalKit as `name`. Raises UserError if VLMEvalKit is not installed."""
    try:
        known = importlib.import_module("vlmeval.config").supported_VLM
        base = importlib.import_module("vlmeval.vlm.base").BaseModel
    except ImportError as error:
        message, hint = f"VLMEvalKit is not installed: {error}", "pip install nvidia-vlmeval"
        raise UserError(message, code="package-missing", hint=hint) from None

    def build(*, use_vllm: bool = False) -> Any:  # VLMEvalKit passes it for names with Qwen2-VL or Llama-4
        if use_vllm:
            message, hint = f"{name} answers with transformers, not with vLLM", "remove the flag"
            raise UserError(message, code="flag-conflict", where="--use-vllm", hint=hint)
        return milora_vlm(base, model, adapter, template)

    known[name] = build


def milora_vlm(base: type, model: str, adapter: str | None, template: str) -> Any:
    """Return an instance of a subclass of VLMEvalKit's BaseModel that answers with base + adapter, greedily."""
    loaded, processor = load_model(model, adapter=adapter)

    class MiloraVLM(base):  # type: ignore[misc]
        """A message is a list of {type: image or text, value}; pictures come first, as in LLaVA."""

        INTERLEAVE = False

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            images = tuple(part["value"] for part in message if part["type"] == "image")
            text = "\n".join(part["value"] for part in message if part["type"] == "text")
            turn = Turn("user", "<image>\n" * len(images) + text)
            return generate(loaded, processor, [Prompt((turn,), images, "exact")], template=template, batch_size=1)[0]

    return MiloraVLM()
