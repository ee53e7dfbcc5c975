"""What LLaVA's trainer, written for transformers 4.37, expects of it and newer versions no longer have.

A release of LLaVA for a newer transformers would replace this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any
from unittest.mock import patch

import torch
from transformers import Trainer, trainer


@contextmanager
def llava_on_new_transformers() -> Iterator[None]:
    """Inside this context LLaVA's `train()` runs on the installed transformers."""
    with ExitStack() as shims:
        for shim in (_layernorm_layers, _tokenizer_argument, _sampler_and_optimizer, _without_deepspeed, _cache):
            shim(shims)
        yield


def _layernorm_layers(shims: ExitStack) -> None:
    """Restore `ALL_LAYERNORM_LAYERS` in transformers.trainer, which LLaVA's trainer imports."""
    if "ALL_LAYERNORM_LAYERS" not in vars(trainer):
        shims.enter_context(patch.object(trainer, "ALL_LAYERNORM_LAYERS", [torch.nn.LayerNorm], create=True))


def _tokenizer_argument(shims: ExitStack) -> None:
    """Accept `Trainer(tokenizer=...)`, which is called `processing_class` now."""
    stock = Trainer.__init__
    if "tokenizer" in signature(stock).parameters:
        return

    def initialise(self: Any, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        stock(self, *args, **kwargs)
        self.tokenizer = tokenizer

    shims.enter_context(patch.object(Trainer, "__init__", initialise))


def _sampler_and_optimizer(shims: ExitStack) -> None:
    """Call LLaVA's `_get_train_sampler` and `create_optimizer` without the arguments that Trainer now passes."""
    llava = import_module("llava.train.llava_trainer").LLaVATrainer
    for name in ("_get_train_sampler", "create_optimizer"):
        if len(signature(vars(llava)[name]).parameters) == 1:
            shims.enter_context(patch.object(llava, name, _ignoring_arguments(vars(llava)[name])))
    sampler = Trainer._get_train_sampler
    if len(signature(sampler).parameters) > 1:  # LLaVA calls super()._get_train_sampler()
        shims.enter_context(patch.object(Trainer, "_get_train_sampler", _on_train_dataset(sampler)))


def _cache(shims: ExitStack) -> None:
    """Accept `forward(cache=...)`, once `past_key_values`: `generate`, which writes calibration texts, passes it."""
    llava = import_module("llava.model.language_model.llava_llama").LlavaLlamaForCausalLM
    stock = llava.forward
    if "cache" in signature(stock).parameters:
        return

    @wraps(stock)  # `generate` reads the signature
    def forward(self: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if cache is not None:
            kwargs["past_key_values"] = cache
        return stock(self, *args, **kwargs)

    shims.enter_context(patch.object(llava, "forward", forward))


def _ignoring_arguments(method: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(self: Any, *_: Any, **__: Any) -> Any:
        return method(self)

    return call


def _on_train_dataset(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, train_dataset: Any = None) -> Any:
        return method(self, self.train_dataset if train_dataset is None else train_dataset)

    return call


def _without_deepspeed(shims: ExitStack) -> None:
    """Replace LLaVA's `maybe_zero_3`, which imports deepspeed even if no parameter is partitioned."""
    if find_spec("deepspeed") is None:
        train = import_module("llava.train.train")
        shims.enter_context(patch.object(train, "maybe_zero_3", lambda param, *_, **__: param.detach().cpu().clone()))
