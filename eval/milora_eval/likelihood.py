"""How likely a model finds a given answer to a prompt: for benchmarks of other suites that rank options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from milora_data.images import expand_to_square, load_image, to_rgb, unmistakable
from milora_vl.generate import Prompt, prompt_ids
from milora_vl.image_tokens import image_token_id, image_tokens
from milora_vl.models import split_processor


def loglikelihoods(
    model: Any, processor: Any, pairs: Sequence[tuple[Prompt, str]], *, template: str = "vicuna_v1"
) -> list[tuple[float, bool]]:
    """Return for each (prompt, answer) the sum of the answer's log-probabilities, and whether greedy decoding says it.

    The answer begins where the prompt ends; one pair at a time, so that padding plays no part.
    """
    return [_one(model, processor, prompt, answer, template) for prompt, answer in pairs]


@torch.inference_mode()
def _one(model: Any, processor: Any, prompt: Prompt, answer: str, template: str) -> tuple[float, bool]:
    tokenizer, pictures = split_processor(processor)
    token, count = (-1, 0) if pictures is None else (image_token_id(model.config), image_tokens(model.config))
    before = prompt_ids(prompt, tokenizer, template, image_token_id=token, image_tokens=count)
    after = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not after:
        return 0.0, True
    inputs: dict[str, Any] = {"input_ids": torch.tensor([before + after], device=model.device)}
    if prompt.images and pictures is not None:
        red, green, blue = (int(255 * value) for value in pictures.image_mean)
        opened = [load_image(i) if isinstance(i, str | Path) else to_rgb(i) for i in prompt.images]
        squares = [expand_to_square(image, (red, green, blue)) for image in opened]
        pixels = pictures(images=unmistakable(squares), return_tensors="pt")["pixel_values"]
        inputs["pixel_values"] = pixels.to(model.device, model.dtype)
    logits = model(**inputs).logits[0, -len(after) - 1 : -1].float()
    targets = torch.tensor(after, device=logits.device)
    values = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(values.sum()), bool((logits.argmax(-1) == targets).all())
