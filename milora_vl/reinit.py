"""MiLoRA for code that already called PEFT: a fresh LoRA starts anew, an adapter of ours gets its two halves back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights

from milora_vl.adapter import Form, apply_milora
from milora_vl.lora.base_check import fitted
from milora_vl.lora.errors import AdapterError
from milora_vl.lora.install import factors, has_halves, lora_layer
from milora_vl.lora.peft_model import MiloraMixin, restore
from milora_vl.lora.sidecar import FILE_NAME, read_sidecar
from milora_vl.policy.rules import PART_OF_METHOD, Rule, RuleMethod
from milora_vl.svd import Part
from milora_vl.towers import forget_peft

_METHOD_OF_PART: dict[str, RuleMethod] = {"minor": "milora", "principal": "pissa", "random": "random"}
assert {part: method for method, part in PART_OF_METHOD.items()} == _METHOD_OF_PART
# Starts of PEFT's own that leave the base weight as it is.
_HARMLESS = (True, False, "gaussian", "orthogonal", "eva")


def reinit_peft(peft_model: PeftModel, part: Part = "minor", form: Form = "anchored") -> Any:
    """Start the LoRA of a PeftModel from singular components of its weights; use the model that is returned.

    Modules, ranks, scales, dropout and modules_to_save stay as its LoraConfig made them. The given object is used up.

    Raises AdapterError for an adapter that has been trained (that would be lost), that is no plain LoRA, or whose start
    has changed the base; PolicyError for ranks larger than a matrix.

    >>> from peft import LoraConfig, get_peft_model
    >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> model = reinit_peft(get_peft_model(base, LoraConfig(r=2, target_modules=["0"])))
    >>> model.milora_targets[0].method, model.peft_config["default"].r
    ('milora', 4)
    """
    if part not in _METHOD_OF_PART:
        raise AdapterError(f"part must be one of {', '.join(_METHOD_OF_PART)}, got {part!r}")
    adapter = _the_adapter(peft_model)
    layers = {p: m for p, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    _require_fresh(layers, adapter)
    rules = [_rule(path, layer, adapter, _METHOD_OF_PART[part]) for path, layer in layers.items()]
    rules += [
        Rule(modules=path, method="full")
        for path, module in peft_model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    ]
    base = peft_model.unload()
    forget_peft(base)
    return apply_milora(base, rules, form=form)


def restore_split(peft_model: PeftModel, folder: str | Path, *, allow_base_mismatch: bool = False) -> Any:
    """Give an adapter of ours that stock PEFT has loaded from `folder` its trained half and its anchor back, in place.

    PeftModel.from_pretrained(base, folder, is_trainable=True) takes the folder for a plain LoRA of rank 2r and would
    train the anchor as well. Call this before the first step. Raises AdapterError if that has happened already, and for
    a folder without milora.json.
    """
    adapter = _the_adapter(peft_model)
    saved = read_sidecar(Path(folder))
    if saved is None:
        raise AdapterError(f"{folder} has no {FILE_NAME}: it holds a plain LoRA, all of which trains")
    sidecar = fitted(peft_model, saved, allow_base_mismatch=allow_base_mismatch)
    stored = load_peft_weights(str(folder), device="cpu")
    for path in sidecar.ranks:
        _require_anchor(lora_layer(peft_model, path), adapter, path, stored)
    ours = restore(peft_model, adapter, sidecar)
    ours.protect_again(adapter)
    return ours


def _the_adapter(model: PeftModel) -> str:
    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"expected a PeftModel, got {type(model).__name__}\n"
            "for a model without an adapter:  apply_milora(model, policy)"
        )
    if isinstance(model, MiloraMixin) and model.sidecars:
        raise AdapterError("this model has its two halves already: it was made by apply_milora or load_adapter")
    if len(model.peft_config) != 1:
        raise AdapterError(f"expected one adapter, found {', '.join(model.peft_config)}: delete the others first")
    name, config = next(iter(model.peft_config.items()))
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"expected a plain LoRA, got {type(config).__name__}")
    if config.use_dora or config.bias != "none" or config.lora_bias:
        raise AdapterError(f"expected a plain LoRA, got {'DoRA' if config.use_dora else 'one that trains biases'}")
    if config.init_lora_weights not in _HARMLESS:
        raise AdapterError(
            f"init_lora_weights={config.init_lora_weights!r} has changed the base, or is another method\n"
            "call get_peft_model without it, on a fresh base model"
        )
    return name


@torch.no_grad()
def _require_fresh(layers: dict[str, LoraLayer], adapter: str) -> None:
    for path, layer in layers.items():
        is_zero = not all(factor.any() for factor in factors(layer, adapter))
        change = 0.0 if is_zero else float(torch.linalg.vector_norm(layer.get_delta_weight(adapter)))  # type: ignore[attr-defined]
        if change > 1e-5:
            raise AdapterError(
                f"{path}: this adapter has been trained, which a new start would lose\n"
                "loaded from a folder of ours? then  restore_split(model, folder)  gives the two halves back"
            )


def _rule(path: str, layer: LoraLayer, adapter: str, method: RuleMethod) -> Rule:
    rank, dropout = layer.r[adapter], layer.lora_dropout[adapter]
    probability = float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0
    return Rule(modules=path, method=method, rank=rank, alpha=layer.scaling[adapter] * rank, dropout=probability)


def _require_anchor(layer: LoraLayer, adapter: str, path: str, stored: dict[str, torch.Tensor]) -> None:
    """The second halves in the model are those in the file: but for rounding to the model's dtype."""
    assert not has_halves(layer, adapter)
    is_embedding = adapter in layer.lora_embedding_A
    names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    for axis, (name, here) in enumerate(zip(names, factors(layer, adapter), strict=True)):
        there = stored[f"base_model.model.{path}.{name}"].to(here.dtype).to(here.device)
        if not torch.equal(there.chunk(2, dim=axis)[1], here.detach().chunk(2, dim=axis)[1]):
            raise AdapterError(
                f"{path}: the anchor has been trained already, so this is no adapter of its kind any more\n"
                "load the folder again, and call restore_split before training; or save this one as a plain LoRA"
            )
