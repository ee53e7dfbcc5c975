"""Private interfaces of transformers, without its Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

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
def recorded_places(processor: Any) -> Iterator[list[list[tuple[int, int, int, int]]]]:
    """Record where a processor expands placeholders while it makes a batch.

    The list gets, for each text, the range of each placeholder and of its replacement. The processor's option
    `return_text_replacement_offsets` would replace it, when no family fails to make tensors with it.
    """
    expand, places = processor.get_text_with_replacements, []  # type: ignore[var-annotated]

    def recording(*args: Any, **kwargs: Any) -> Any:
        texts, replaced = expand(*args, **kwargs)
        places.extend([(*one["span"], *one["new_span"]) for one in row] for row in replaced)
        return texts, replaced

    processor.get_text_with_replacements = recording
    try:
        yield places
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
