"""VLMEvalKit: read its predictions (xlsx, tsv), which needs no VLMEvalKit, and answer as a model of it.

`milora_vlm(...)` returns a model for `vlmeval.config.supported_VLM`; VLMEvalKit has
no plug-in hook, so `register` adds the model to this dict.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from milora_data.records.record import Turn
from milora_eval.data_files import read_excel, read_table
from milora_vl.common.errors import DataError, UserError


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a predictions table as {question_id, text}. Raises DataError if a column is missing."""
    table = read_excel(path) if path.suffix == ".xlsx" else read_table(path).fillna("")
    if table.empty or not {"index", "prediction"} <= set(table.columns):
        columns = ", ".join(map(str, table.columns)) or "nothing"
        message = f"expected a table with the columns index and prediction, got: {columns}"
        raise DataError(message, code="predictions-format", where=str(path))
    pairs = zip(table["index"], table["prediction"], strict=True)
    return [{"question_id": index, "text": str(text)} for index, text in pairs if index != ""]


def register(name: str, model: str, adapter: str | None = None, *, template: str = "vicuna_v1") -> None:
    """Register base + adapter with VLMEvalKit as `name`. Raises UserError if VLMEvalKit is not installed."""
    try:
        known = importlib.import_module("vlmeval.config").supported_VLM
        base = importlib.import_module("vlmeval.vlm.base").BaseModel
    except ImportError as error:
        raise UserError(
            f"VLMEvalKit is not installed: {error}",
            code="package-missing",
            hint="pip install nvidia-vlmeval, or install it from its repository",
        ) from None

    def build(*, use_vllm: bool = False) -> Any:  # VLMEvalKit passes it for names with Qwen2-VL or Llama-4
        if use_vllm:
            raise UserError(
                f"{name} answers with transformers, not with vLLM",
                code="flag-conflict",
                where="--use-vllm",
                hint="remove the flag; or serve a merged model with vLLM, and let VLMEvalKit's GPT4V ask it: "
                "docs/evaluate.md#other-suites",
            )
        return milora_vlm(base, model, adapter, template)

    known[name] = build


def milora_vlm(base: type, model: str, adapter: str | None, template: str) -> Any:
    """Return an instance of a subclass of VLMEvalKit's BaseModel that answers with base + adapter, greedily."""
    from milora_vl.interop.load_model import load_model
    from milora_vl.models.generate import Prompt, generate

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
