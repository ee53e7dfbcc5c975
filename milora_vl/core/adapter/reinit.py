"""`reinit_peft` and `restore_split`: MiLoRA for code that already called PEFT.

`reinit_peft` initializes a new LoRA from singular components. `restore_split` restores the difference and the anchor
of a MiLoRA adapter that stock PEFT has loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from milora_vl.core.adapter.anchored import factors, has_anchor
from milora_vl.core.adapter.apply import apply_milora
from milora_vl.core.adapter.folders import PEFT_PREFIX, AdapterError
from milora_vl.core.adapter.lora import lora_layer
from milora_vl.core.adapter.peft_model import MiloraMixin, restore
from milora_vl.core.adapter.sidecar import FILE_NAME, fitted, read_sidecar, require_trainable, stored_tensors
from milora_vl.core.calibration.bases import Calibration, CalibrationError
from milora_vl.core.policy.rules import METHODS, Rule, RuleMethod
from milora_vl.core.svd import Part

METHOD_OF_PART: dict[str, RuleMethod] = {"minor": "milora", "principal": "pissa", "random": "random"}
assert all(METHODS[method].part == part for part, method in METHOD_OF_PART.items())
_TOO_LATE = "reload the folder and call restore_split before training, or save this one as a plain LoRA"
# Initializations of PEFT that do not change the base weight.
_BASE_UNCHANGED = (True, False, "gaussian", "orthogonal", "eva")


def reinit_peft(
    peft_model: PeftModel,
    part: Part = "minor",
    *,
    protect: float | None = None,
    calibration: Calibration | None = None,
    progress: bool = False,
) -> Any:
    """Return a PeftModel whose LoRA starts from singular components of the base weights. Use only the returned model.

    Modules, ranks, scales, dropout and modules_to_save come from the given LoraConfig. The given object cannot be
    used afterwards. `protect` is the share of the rules of the same name, by default 0.95 for `minor` and 0 for the
    others; it needs `calibration` batches (see `apply_milora`), and 0 makes the paper's MiLoRA. `progress` shows a
    progress bar on stderr.

    Raises CalibrationError without the batches that `protect` needs. Raises AdapterError if the adapter has been
    trained already, is no plain LoRA, or has an initialization that changes the base weights. Raises PolicyError for
    ranks larger than a matrix.

    >>> from peft import LoraConfig, get_peft_model
    >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> model = reinit_peft(get_peft_model(base, LoraConfig(r=2, target_modules=["0"])), protect=0)
    >>> model.milora_targets[0].method, model.peft_config["default"].r
    ('milora', 4)
    """
    if part not in METHOD_OF_PART:
        raise AdapterError(f"expected one of {', '.join(METHOD_OF_PART)}, got {part!r}", where="part")
    adapter = _the_adapter(peft_model)
    modules = dict(peft_model.get_base_model().named_modules())
    layers = {path: module for path, module in modules.items() if isinstance(module, LoraLayer)}
    full = {path: module for path, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    _require_fresh(layers, full, adapter)
    method = METHOD_OF_PART[part]
    if (METHODS[method].protect if protect is None else protect) and calibration is None:
        message = f"method {method} protects the inputs of ordinary text, which needs calibration batches"
        hint = "pass  calibration=calibration_texts(model)  or batches of your own, or  protect=0"
        raise CalibrationError(message, where="calibration", hint=hint)
    rules = [_rule(path, layer, adapter, method, protect) for path, layer in layers.items()]
    base = peft_model.unload()
    vars(base).pop("peft_config", None)  # older versions of PEFT leave it
    rules += [Rule(modules=path, method="full") for path in _with_weights(base, full)]
    return apply_milora(base, rules, calibration=calibration, progress=progress)


def restore_split(peft_model: PeftModel, folder: str | Path, *, allow_base_mismatch: bool = False) -> Any:
    """Restore what must not train in a MiLoRA adapter that stock PEFT has loaded from `folder`, in place.

    PeftModel.from_pretrained(base, folder, is_trainable=True) loads the folder as a plain LoRA, and would train the
    anchor too, or the fixed A of protected layers. Call this function before the first step.

    Raises AdapterError if one of them has been trained already, and for a folder without milora.json.
    """
    adapter = _the_adapter(peft_model)
    saved = read_sidecar(Path(folder))
    if saved is None:
        message, hint = f"has no {FILE_NAME}: this is a plain LoRA without an anchor", "train it without restore_split"
        raise AdapterError(message, where=str(folder), hint=hint)
    require_trainable(Path(folder), saved, is_trainable=True)
    sidecar = fitted(peft_model, saved, allow_base_mismatch=allow_base_mismatch)
    stored = stored_tensors(Path(folder))
    for path in sidecar.ranks:
        layer = lora_layer(peft_model, path)
        if adapter in layer.lora_A:
            _require_anchor(layer, adapter, path, stored)
    ours = restore(peft_model, adapter, sidecar, sidecar.read_anchors(Path(folder)))
    changed = ours.changed_A()
    if changed:
        message = f"the A of {len(changed):,} modules has been trained already, so their inputs are no longer protected"
        raise AdapterError(message, code="adapter-wrong-anchor", where=changed[0], hint=_TOO_LATE)
    return ours


def _the_adapter(model: PeftModel) -> str:
    if not isinstance(model, PeftModel):
        hint = "to add an adapter:  apply_milora(model, policy)"
        raise AdapterError(f"expected a PeftModel, got {type(model).__name__}", hint=hint)
    if isinstance(model, MiloraMixin) and model.sidecars:
        message = "this model already has an adapter of apply_milora or load_adapter"
        raise AdapterError(message, hint="use the model without this call")
    if len(model.peft_config) != 1:
        hint = "delete the other adapters first"
        raise AdapterError(f"expected one adapter, found {', '.join(model.peft_config)}", hint=hint)
    name, config = next(iter(model.peft_config.items()))
    unsupported = _unsupported(config)
    if unsupported:
        message = f"expected a plain LoRA that does not change the base weights, got {unsupported}"
        hint = "reload the base model, and call get_peft_model with a plain LoraConfig"
        raise AdapterError(message, code="adapter-unsupported-kind", where=f"adapter {name!r}", hint=hint)
    return name


def _unsupported(config: Any) -> str:
    """Name what is not a plain LoRA in a PEFT config; "" for a plain LoRA."""
    if not isinstance(config, LoraConfig):
        return type(config).__name__
    if config.use_dora:
        return "DoRA"
    if config.init_lora_weights not in _BASE_UNCHANGED:
        return f"init_lora_weights {config.init_lora_weights!r}"
    for name in ("trainable_token_indices", "target_parameters", "layer_replication"):
        if getattr(config, name, None):  # the oldest PEFT has not all of them
            return f"a LoRA with {name}"
    return "a LoRA that trains biases" if config.bias != "none" or config.lora_bias else ""


@torch.no_grad()
def _require_fresh(layers: dict[str, LoraLayer], full: dict[str, ModulesToSaveWrapper], adapter: str) -> None:
    trained = [path for path, layer in layers.items() if _update_norm(layer, adapter) > 1e-5]
    for path, module in full.items():
        pairs = zip(module.modules_to_save[adapter].parameters(), module.original_module.parameters(), strict=True)
        trained += [path] * (not all(torch.equal(*pair) for pair in pairs))
    if trained:
        message = "this adapter has been trained already, and a new initialization would lose that training"
        hint = "if it is a MiLoRA adapter loaded from a folder, call  restore_split(model, folder)  instead"
        raise AdapterError(message, where=trained[0], hint=hint)


def _update_norm(layer: LoraLayer, adapter: str) -> float:
    if not all(factor.any() for factor in factors(layer, adapter)):
        return 0.0
    return float(torch.linalg.vector_norm(layer.get_delta_weight(adapter)))  # type: ignore[attr-defined]


def _rule(path: str, layer: LoraLayer, adapter: str, method: RuleMethod, protect: float | None) -> Rule:
    rank, dropout = layer.r[adapter], layer.lora_dropout[adapter]
    probability = float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else 0.0
    alpha = layer.scaling[adapter] * rank
    return Rule(modules=path, method=method, rank=rank, alpha=alpha, dropout=probability, protect=protect)


def _with_weights(base: torch.nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the modules that hold the weights: modules_to_save may name a container, such as a projector."""
    inside = {path: base.get_submodule(path).named_modules(prefix=path) for path in paths}
    holding = (p for pairs in inside.values() for p, m in pairs if next(m.parameters(recurse=False), None) is not None)
    return list(dict.fromkeys(holding))


def _require_anchor(layer: LoraLayer, adapter: str, path: str, stored: dict[str, Tensor]) -> None:
    """Raise AdapterError unless the anchors in the model equal the saved ones, rounded to the model's dtype."""
    assert not has_anchor(layer, adapter)
    for axis, factor in enumerate(factors(layer, adapter)):
        saved = stored[f"{PEFT_PREFIX}{path}.lora_{'AB'[axis]}.weight"].to(factor.dtype).to(factor.device)
        first, second = zip(saved.chunk(2, dim=axis), factor.detach().chunk(2, dim=axis), strict=True)
        # A0 is the second half of [D; A0], and B0 is the difference of the halves [B0 + E, E].
        pair = [b - e for b, e in zip(first, second, strict=True)] if axis == 1 else second
        if not torch.equal(*pair):
            message = "the anchor has been trained already, so it cannot be restored"
            raise AdapterError(message, code="adapter-wrong-anchor", where=path, hint=_TOO_LATE)
