"""The model `milora` for lmms-eval: base + adapter, which lmms-eval's LLaVA wrappers cannot load.

lmms-eval finds it through the entry point `lmms_eval.models` (see pyproject.toml):
    python -m lmms_eval --model milora --model_args pretrained=llava-1.5-7b,adapter=runs/a --tasks mme
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from milora_data.records.record import Turn
from milora_eval.answers.runner import loglikelihoods
from milora_vl.common.errors import UserError
from milora_vl.interop.load_model import load_by_flags
from milora_vl.models.generate import Prompt, generate
from milora_vl.models.prompts import prompts_of

MANIFEST = ModelManifest(model_id="milora", simple_class_path="milora_eval.lmms.Milora")


class Milora(lmms):
    """Greedy decoding in batches; questions about one picture share its computation."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "llava-1.5-7b",
        adapter: str | None = None,
        template: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        folder = None if adapter is None else Path(adapter)
        self.prompts = prompts_of(pretrained, folder, template)
        self.loaded, self.processor = load_by_flags(pretrained, folder, dtype, device)
        self.prompts.limit(self.processor)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return the answers to requests (context, options, document to pictures, document, task, split)."""
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: repr(requests[index].args[1]))
        for _, same_options in groupby(order, key=lambda index: repr(requests[index].args[1])):
            chosen = list(same_options)
            options = requests[chosen[0]].args[1]
            replies = generate(
                self.loaded,
                self.processor,
                [self._prompt(*requests[index].args[:1], *requests[index].args[2:]) for index in chosen],
                template=self.prompts.template,
                image_aspect_ratio=self.prompts.image_aspect_ratio,
                max_new_tokens=int(options.get("max_new_tokens", 128)),
                num_beams=_beams(options),
                batch_size=self.batch_size,
            )
            for index, reply in zip(chosen, replies, strict=True):
                answers[index] = _until(reply.text, options.get("until", ()))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        pairs = []
        for request in requests:
            context, target, *source = request.args
            text = target if isinstance(target, str) else target(self._document(*source[1:]))
            pairs.append((self._prompt(context, *source), text))
        return loglikelihoods(self.loaded, self.processor, pairs, self.prompts)

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise UserError(
            "the model milora does not support tasks with several rounds",
            code="lmms-unsupported",
            hint="leave these tasks out",
        )

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _prompt(self, context: str, pictures_of: Any, number: int, task: str, split: str) -> Prompt:
        images = tuple(pictures_of(self._document(number, task, split)) or ())
        marks = "" if "<image>" in context else "<image>\n" * len(images)
        return Prompt((Turn("user", marks + context),), images, "exact")


def _beams(options: dict[str, Any]) -> int:
    if options.get("do_sample") and options.get("temperature", 1.0):
        raise UserError(
            f"the model milora decodes greedily, the task asks for {options}",
            code="lmms-unsupported",
            hint="leave these tasks out, or set do_sample: false in their generation_kwargs",
        )
    return int(options.get("num_beams") or 1)


def _until(text: str, stops: Any) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
