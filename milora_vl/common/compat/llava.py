"""What LLaVA's trainer, written for transformers 4.37, expects of it and newer versions no longer have.

A release of LLaVA for a newer transformers would replace this file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from transformers import Trainer, trainer

from milora_vl.common.errors import UserError


@contextmanager
def llava_on_new_transformers(non_lora: str) -> Iterator[None]:
    """Inside this context LLaVA's `train()` runs on the installed transformers; `non_lora` is its file of that name."""
    with ExitStack() as shims:
        _layernorm_layers(shims)
        _tokenizer_argument(shims)
        _sampler_and_optimizer(shims)
        _checkpoints(shims, non_lora)
        _without_deepspeed(shims)
        _cache(shims)
        yield


def _layernorm_layers(shims: ExitStack) -> None:
    """Restore `ALL_LAYERNORM_LAYERS` in transformers.trainer, which LLaVA's trainer imports."""
    if "ALL_LAYERNORM_LAYERS" not in vars(trainer):
        shims.enter_context(patch.object(trainer, "ALL_LAYERNORM_LAYERS", [torch.nn.LayerNorm], create=True))


def _tokenizer_argument(shims: ExitStack) -> None:
    """Accept `Trainer(tokenizer=...)`, which is called `processing_class` now."""
    stock = Trainer.__init__

    def initialise(self: Any, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            kwargs.setdefault("processing_class", tokenizer)
        stock(self, *args, **kwargs)
        self.tokenizer = tokenizer

    shims.enter_context(patch.object(Trainer, "__init__", initialise))


def _sampler_and_optimizer(shims: ExitStack) -> None:
    """Call LLaVA's `_get_train_sampler` and `create_optimizer` without the arguments that Trainer now passes."""
    llava, stock = import_module("llava.train.llava_trainer").LLaVATrainer, Trainer._get_train_sampler
    for name in ("_get_train_sampler", "create_optimizer"):
        if len(signature(method := vars(llava)[name]).parameters) == 1:
            shims.enter_context(patch.object(llava, name, _ignoring_arguments(method)))

    def sampler(self: Any, train_dataset: Any = None) -> Any:  # LLaVA calls super()._get_train_sampler()
        return stock(self, self.train_dataset if train_dataset is None else train_dataset)

    shims.enter_context(patch.object(Trainer, "_get_train_sampler", sampler))


def _ignoring_arguments(method: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda self, *_, **__: method(self)


def _checkpoints(shims: ExitStack, non_lora: str) -> None:
    """Drop the argument `metrics`, which LLaVA passes to `_save_checkpoint`, and keep the projector in checkpoints.

    LLaVA saves the projector at the end alone, and a resumed LoRA run would start it again (LLaVA issue 844).
    """
    save, load = Trainer._save_checkpoint, Trainer._load_from_checkpoint

    def save_checkpoint(self: Any, model: Any, trial: Any, metrics: Any = None) -> None:
        if isinstance(self.model, PeftModel):
            collect = import_module("llava.train.train").get_peft_state_non_lora_maybe_zero_3
            state = collect(self.model.named_parameters())  # under ZeRO-3 every process takes part
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(state, folder / non_lora)
        save(self, model, trial)

    def load_from_checkpoint(self: Any, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        load(self, checkpoint, *args, **kwargs)
        beside = {name: p for name, p in self.model.named_parameters() if p.requires_grad and "lora_" not in name}
        if not beside or not isinstance(self.model, PeftModel):
            return
        file = Path(checkpoint) / non_lora
        if not file.is_file():
            message = f"has no {non_lora}: the projector would start again from its first weights"
            hint = "train again from the start, in another output_dir"
            raise UserError(message, where=checkpoint, hint=hint)
        with torch.no_grad():
            for name, tensor in torch.load(file, map_location="cpu", weights_only=True).items():
                beside[name].copy_(tensor)

    shims.enter_context(patch.object(Trainer, "_save_checkpoint", save_checkpoint))
    shims.enter_context(patch.object(Trainer, "_load_from_checkpoint", load_from_checkpoint))


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


def _without_deepspeed(shims: ExitStack) -> None:
    """Let LLaVA's `maybe_zero_3` run, which imports deepspeed to ask whether a parameter is partitioned.

    LLaVA's train.py may be `__main__`, whose functions nothing can replace, so the modules exist that it imports.
    """
    if find_spec("deepspeed") is None:
        package = ModuleType("deepspeed")
        parameters = ModuleType("deepspeed.runtime.zero.partition_parameters")
        package.__spec__ = ModuleSpec(package.__name__, None)  # find_spec fails on a module without one
        package.zero = parameters.ZeroParamStatus = None  # type: ignore[attr-defined]
        for module in (package, parameters):
            sys.modules[module.__name__] = module
            shims.callback(sys.modules.pop, module.__name__, None)
