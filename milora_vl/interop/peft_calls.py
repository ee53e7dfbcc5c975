"""Replacements of PEFT's `get_peft_model` and `PeftModel.from_pretrained` that make MiLoRA adapters."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor

from milora_vl.common.cli.console import amount
from milora_vl.common.errors import UserError, first_line, with_context
from milora_vl.core.adapter.reinit import reinit_peft, restore_split
from milora_vl.core.adapter.sidecar import FILE_NAME
from milora_vl.core.calibration.bases import CalibrationError
from milora_vl.core.calibration.texts import calibration_texts
from milora_vl.core.policy.rules import METHODS, label_of, what_trains
from milora_vl.core.policy.towers import find_towers


def replacement(stock: Callable[..., Any], protect: float | None) -> Callable[..., Any]:
    """Return `get_peft_model` for MiLoRA: it calls PEFT's function `stock`, then initializes the LoRA.

    With `protect`, the base model writes the texts that calibrate it.
    """
    share = METHODS["milora"].protect if protect is None else protect

    def get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        texts = _texts(model) if share and isinstance(peft_config, LoraConfig) else None
        chosen = getattr(peft_config, "target_modules", None)  # PEFT writes names in place of `all-linear`
        adapted = stock(model, peft_config, *args, **kwargs)
        if not isinstance(peft_config, LoraConfig):
            sys.stderr.write(f"milora: {type(peft_config).__name__} is not a LoRA and is left unchanged\n")
            return adapted
        if not isinstance(chosen, str):
            _remove_vision_adapters(adapted, chosen or ())
        try:
            tuned = reinit_peft(adapted, protect=share, calibration=texts, progress=True)
        except CalibrationError as error:
            hint = "texts reach neither vision tower nor projector: exclude them, or protect=0"
            raise with_context(error, hint=hint) from None
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error), code="adapter-unsupported-kind", where="get_peft_model") from error
        for (method, protects), number in Counter((t.method, t.protect) for t in tuned.milora_targets).items():
            trains = what_trains(method, protects)
            sys.stderr.write(f"milora: {label_of(method, protects)} on {amount(number, 'module')}: {trains}\n")
        return tuned

    return get_peft_model


def restoring_loader(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return `PeftModel.from_pretrained` for MiLoRA: it calls PEFT's `stock`, then restores difference and anchor."""

    def from_pretrained(
        model: Any, model_id: Any, adapter_name: str = "default", is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        loaded = stock(model, model_id, adapter_name, is_trainable, *args, **kwargs)
        if is_trainable and (Path(model_id) / FILE_NAME).is_file():
            loaded = restore_split(loaded, model_id)
            sys.stderr.write(f"milora: {model_id} continues training as a MiLoRA adapter\n")
        return loaded

    return from_pretrained


def _texts(model: Any) -> list[dict[str, Tensor]]:
    is_slow = torch.accelerator.is_available() and next(model.parameters()).device.type == "cpu"
    where = " on the CPU (hours for a 7B: move the model to its GPU first)" if is_slow else ""
    sys.stderr.write(f"milora: the base model writes texts, to find the inputs of ordinary text{where}\n")
    try:
        return calibration_texts(model)
    except (CalibrationError, AttributeError, NotImplementedError, TypeError, ValueError) as error:
        # A class of the calling code may have a `generate` that the installed transformers cannot call.
        message = f"the base model cannot write the texts that find its inputs: {first_line(error)}"
        hint = "train the paper's MiLoRA, which needs no texts, with  protect 0"
        raise UserError(message, where="protect", hint=hint) from error


def _remove_vision_adapters(model: Any, chosen: Collection[str]) -> None:
    """Remove the LoRA from vision modules that suffix targets such as q_proj match by accident (LLaVA issue 1380).

    Modules whose full paths are in `chosen` stay, and all of them if PEFT has adapted vision modules alone.
    """
    base = model.get_base_model()
    towers = find_towers(base)
    adapted = [p for p, m in base.named_modules() if isinstance(m, LoraLayer)]
    vision = [path for path in adapted if towers.tower_of(path) == "vision"]
    by_name = [path for path in vision if path not in chosen]
    if len(vision) == len(adapted):
        return
    for path in by_name:
        parent, _, name = path.rpartition(".")
        layer = base.get_submodule(path)
        setattr(base.get_submodule(parent), name, layer.get_base_layer())
    if by_name:
        sys.stderr.write(f"milora: {len(by_name):,} modules of the vision tower, matched by name only, stay frozen\n")
