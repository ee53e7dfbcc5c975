"""A base with an adapter as a model of VLMEvalKit: `register` adds it to the dict of models, as there is no hook."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milora_data.records.record import Turn
from milora_eval.benchmark import Benchmark
from milora_eval.registry import BENCHMARKS, find_benchmark
from milora_vl.common.errors import UserError
from milora_vl.interop.load_model import load_model
from milora_vl.models.generate import Prompt, generate
from milora_vl.models.prompts import prompts_of

LONGEST = 1024  # the limit of an answer in a set that `milora_eval run` does not have


def register(name: str, model: str, adapter: str | None = None, *, template: str | None = None) -> None:
    """Register base + adapter with VLMEvalKit as `name`; without a `template` it is asked as `milora_eval run` does.

    Raises UserError if VLMEvalKit is not installed.
    """
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


def benchmark_of(dataset: str | None) -> Benchmark | None:
    """Return the benchmark of `milora_eval run` that reads VLMEvalKit's table of this name, None without one.

    >>> benchmark_of("MMBench_DEV_EN").name, benchmark_of("COCO_VAL")
    ('mmbench', None)
    """
    found = (each for each in map(find_benchmark, BENCHMARKS) if f"{dataset}.tsv" in each.files[0].split("|"))
    return next(found, None)


def milora_vlm(base: type, model: str, adapter: str | None, template: str | None = None) -> Any:
    """Return an instance of a subclass of VLMEvalKit's BaseModel that answers with base + adapter, greedily."""
    prompts = prompts_of(model, None if adapter is None else Path(adapter), template)
    loaded, processor = load_model(model, adapter=adapter)
    prompts.limit(processor)

    class MiloraVLM(base):  # type: ignore[misc]
        """A message is a list of {type: image or text, value}; pictures come first, as in LLaVA."""

        INTERLEAVE = False

        def use_custom_prompt(self, dataset: str) -> bool:
            return benchmark_of(dataset) is not None

        def build_prompt(self, line: Mapping[str, Any], dataset: str) -> list[dict[str, str]]:
            benchmark, pictures = benchmark_of(dataset), self.dump_image(line, dataset)
            assert benchmark is not None
            row = {str(name): str(cell) for name, cell in line.items() if cell == cell}  # a missing cell is NaN
            item = benchmark.item(0, row | {"picture": Path(pictures[0])})
            shown = [{"type": "image", "value": str(picture)} for picture in pictures]
            return [*shown, {"type": "text", "value": item.plain_text}]

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            images = tuple(part["value"] for part in message if part["type"] == "image")
            text = "\n".join(part["value"] for part in message if part["type"] == "text")
            benchmark = benchmark_of(dataset)
            [answer] = generate(
                loaded, processor, [Prompt((Turn("user", "<image>\n" * len(images) + text),), images, "exact")],
                template=prompts.template, image_aspect_ratio=prompts.image_aspect_ratio, batch_size=1,
                max_new_tokens=LONGEST if benchmark is None else benchmark.max_new_tokens,
            )  # fmt: skip
            return answer.text

    return MiloraVLM()
