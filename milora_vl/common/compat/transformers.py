"""Private interfaces of transformers, without its Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import TrainingArguments


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside this context transformers loads and builds unsharded models even under ZeRO-3.

    A public way to switch `zero.Init` off for one model would replace it.
    """
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def forget_conversions(model: nn.Module) -> None:
    """Let `save_pretrained` write the names that the model has.

    Under ZeRO-3, transformers keeps renamings of old checkpoints even if it applied none, and reverts them when it
    saves. A fix there would replace it.
    """
    vars(model).pop("_weight_conversions", None)


def layer_kinds(model: Any) -> set[str]:
    """Return the class names of the layers that FSDP2 wraps. A public name of them would replace it."""
    return set(model._no_split_modules or ())


@contextmanager
def recorded_spans(processor: Any) -> Iterator[list[list[tuple[int, int, int, int]]]]:
    """Record where a processor expands placeholders while it makes a batch.

    The list gets, for each text, the range of each placeholder and of its replacement. The processor's option
    `return_text_replacement_offsets` would replace it, when no family fails to make tensors with it.
    """
    expand, spans = processor.get_text_with_replacements, []  # type: ignore[var-annotated]

    def recording(*args: Any, **kwargs: Any) -> Any:
        texts, replaced = expand(*args, **kwargs)
        spans.extend([(*one["span"], *one["new_span"]) for one in row] for row in replaced)
        return texts, replaced

    processor.get_text_with_replacements = recording
    try:
        yield spans
    finally:
        del processor.get_text_with_replacements


def count_image_tokens(processor: Any, size: tuple[int, int]) -> int:
    """Return how many tokens a processor spends on a picture (height, width), without its pixels.

    Serving engines call the same method. A public name of it would replace it.
    """
    return int(processor._get_num_multimodal_tokens(image_sizes=[list(size)])["num_image_tokens"][0])


def unstarted_arguments(**values: Any) -> TrainingArguments:
    """Return TrainingArguments that open no process group and choose no device, to check their values.

    A check in transformers of the values alone would replace it.
    """
    from transformers import TrainingArguments

    class Unstarted(TrainingArguments):
        @cached_property
        def _setup_devices(self) -> torch.device:
            self._n_gpu = 0
            return torch.device("cpu")

    return Unstarted(**values)


def use_one_gpu(args: TrainingArguments) -> None:
    """Train on one of several visible GPUs: torch's DataParallel would separate the images of a batch from its records.

    An argument of the Trainer that switches DataParallel off would replace it.
    """
    args._n_gpu = 1


@contextmanager
def quiet_bars() -> Iterator[None]:
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def silence_deepspeed() -> None:
    """Hide DeepSpeed's message that there is no GPU: transformers imports DeepSpeed to save a model."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")


def pass_texts_unchanged(model: nn.Module) -> None:
    """Let the cross-attention of Llama 3.2 Vision, if the model has any, return rows without a picture as they came.

    transformers skips these layers for a batch of texts alone. In a mixed batch it lets a text without a picture attend
    to the pictures of its row, which are padding. A switch in its forward would replace this.
    """
    for module in model.modules():
        if "cross_attn_attn_gate" in dict(module.named_parameters(recurse=False)):
            module.register_forward_hook(_unchanged, with_kwargs=True)  # a second one changes nothing


def _unchanged(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    sees = kwargs["full_text_row_masked_out_mask"]  # (rows, 1, length, 1): 0 where a token attends to no picture
    return output if sees is None else torch.where(sees[:, 0].any(dim=1, keepdim=True), output, args[0])
