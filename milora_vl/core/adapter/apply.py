"""`apply_milora` and `merge`: apply a policy to a model (arXiv:2406.09044). The result is a PeftModel for any trainer.

The way of `apply_milora`, with the modules to read next:

1. `Policy.resolve` selects the modules, with method and rank                 policy/resolve.py
2. `protect` makes A off the inputs that ordinary text and pictures use       fixed_a.py, calibration/
   `initialize` decomposes other weights and returns A0 and B0                initialize.py, svd/
3. `make_lora` lets PEFT create a LoRA on these modules, of rank r or 2r      lora.py
4. `fix_A` makes the A of a rule with `protect` a buffer                      fixed_a.py
   `install_factors` gives other factors a difference and an anchor           anchored.py

The base weights never change. Nothing of the model is changed before step 3, so an error in a rule or a weight leaves
the model unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from milora_vl.core.adapter.anchored import install_factors
from milora_vl.core.adapter.fixed_a import Protection, fix_A, protect
from milora_vl.core.adapter.folders import AdapterError
from milora_vl.core.adapter.initialize import Initial, initialize
from milora_vl.core.adapter.lora import lora_layer, make_lora, require_module, set_dropout
from milora_vl.core.adapter.peft_model import MiloraMixin, adopt
from milora_vl.core.adapter.rates import check_rates_at_first_step
from milora_vl.core.adapter.sidecar import Sidecar, frozen_fingerprints, precision, require_readable
from milora_vl.core.calibration.activations import require_calibration
from milora_vl.core.calibration.bases import Calibration
from milora_vl.core.policy import Policy, Rule, Target
from milora_vl.core.policy.towers import canonical_names, is_wrapped_by_peft
from milora_vl.core.weights.matrices import fingerprint, read_matrix


def apply_milora(
    model: nn.Module,
    policy: Policy | str | Path | Sequence[Mapping[str, Any] | Rule],
    *,
    calibration: Calibration | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Any:
    """Return `model` as a PeftModel whose adapters follow the policy. Its output is unchanged until training starts.

    With `protect` in its rule, which is 0.95 for `milora`, a layer computes y = W x + s B A x: A (r, in) never changes
    and is zero on the protected inputs, B (out, r) trains from zero (`fixed_a.py`). Without it (`protect: 0`), `milora`
    is the paper's: y = W x + s (B A - B0 A0) x, where A and B train from A0 and B0 on; the parameters are the
    differences D = A - A0 and E = B - B0, from zero on (`anchored.py`).
    If the policy has only `full` and `frozen` rules, the model itself is returned, with `requires_grad` set. The result
    has the attributes `milora_targets` (one Target per trained module), `milora_report` (one LayerReport per
    decomposed weight) and `milora_protection` (one Protection per protected module, by path).

    `calibration` is for rules with `protect`: arguments of the model's forward, one mapping per batch, for example
    {"input_ids": ..., "attention_mask": ...}; `calibration_texts(model)` writes them. Several lists of batches in a
    mapping by name weigh the same. The base model runs on them once.

    Factors, spectra and every fixed A are cached in `cache_dir`. `progress` shows a progress bar on stderr.

    Weight decay pulls towards no update, that is towards W. An optimizer uses the learning rates and weight decays of
    the rules if it gets `parameter_groups(model, learning_rate=...)`; if not, a warning names them at its first step.

    Raises PolicyError for rules that do not fit the model, WeightError for weights that cannot be decomposed,
    CalibrationError for batches that do not calibrate the model, and AdapterError for models that already have an
    adapter.

    >>> from milora_vl import calibration_texts
    >>> from milora_vl.models.tiny import tiny_llama
    >>> model = tiny_llama()[0]
    >>> rules = [{"modules": "language", "method": "milora", "rank": 2}]
    >>> tuned = apply_milora(model, rules, calibration=calibration_texts(model))
    >>> tuned.peft_config["default"].r, round(min(p.energy for p in tuned.milora_protection.values()), 2) >= 0.95
    (2, True)
    >>> tuned = apply_milora(nn.Sequential(nn.Linear(4, 4)), [{**rules[0], "protect": 0}])  # the paper's MiLoRA
    >>> tuned.milora_report[0].rank, tuned.base_model.model[0].lora_A["default"].weight.shape
    (2, torch.Size([4, 4]))
    """
    require_module(model)
    if is_wrapped_by_peft(model):
        hint = "pass the base model, or unload the adapter first"
        raise AdapterError("this model already has a PEFT adapter", hint=hint)
    require_readable(model)
    targets = Policy.parse(policy).resolve(model)
    return apply_targets(model, targets, calibration=calibration, cache_dir=cache_dir, progress=progress)


def apply_targets(
    model: nn.Module,
    targets: Sequence[Target],
    *,
    calibration: Calibration | None = None,
    cache_dir: str | Path | None = None,
    calibration_cache: str | Path | None = None,
    weights: str | None = None,
    progress: bool = False,
) -> Any:
    """Return what `apply_milora` returns, for a policy that is resolved already.

    `calibration_cache` caches every fixed A in place of `cache_dir`; `weights` is the key of the model if it is known.
    """
    require_calibration(targets, calibration)
    if all(target.rank is None for target in targets):
        check_rates_at_first_step(_train_in_full(model, targets))
        return model
    fixed = protect(model, targets, calibration, calibration_cache or cache_dir, weights=weights, is_shown=progress)
    initial = initialize(model, targets, cache_dir=cache_dir, progress=progress)
    sidecar = _describe(model, targets, initial, fixed)
    tuned = adopt(make_lora(model, targets))
    for target in targets:
        if target.rank is not None:
            layer = lora_layer(tuned, target.path)
            set_dropout(layer, "default", target.dropout)
            if target.has_anchor:
                install_factors(layer, "default", initial[target.path].A0, initial[target.path].B0)
            elif target.has_fixed_A:
                fix_A(layer, "default", fixed[target.path][0])
    tuned.remember("default", sidecar)
    check_rates_at_first_step(tuned)
    return tuned


def merge(model: PeftModel) -> nn.Module:
    """Return the base model with W + s (B A - B0 A0) in place of each adapted W.

    The PeftModel cannot be used afterwards, as with PEFT's merge_and_unload. Raises AdapterError if `model` is no
    PeftModel, or if its base holds the update of earlier runs.

    >>> rules = [{"modules": "language", "method": "milora", "rank": 2, "protect": 0}]
    >>> merge(apply_milora(nn.Sequential(nn.Linear(4, 4)), rules))
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
    )
    """
    if not isinstance(model, PeftModel):
        hint = "pass the model that apply_milora or load_adapter returned"
        raise AdapterError(f"merge needs a PeftModel, got {type(model).__name__}", hint=hint)
    if isinstance(model, MiloraMixin) and model.earlier is not None:
        message = "the base holds the update of earlier runs, which merge would leave out"
        raise AdapterError(message, hint="save the adapter, and merge what load_adapter returns for its folder")
    return model.merge_and_unload()


def _describe(
    model: nn.Module,
    targets: Sequence[Target],
    initial: Mapping[str, Initial],
    fixed: Mapping[str, tuple[Tensor, Protection]],
) -> Sidecar:
    """Return the content of milora.json. Call this before PEFT wraps the layers whose weights get a fingerprint."""
    names = canonical_names(model)
    fingerprints = {}
    for path in (target.path for target in targets if target.rank is not None):
        module = model.get_submodule(path)
        found = initial[path].fingerprint if path in initial else fingerprint(read_matrix(module))
        fingerprints[path] = replace(found, eps=max(found.eps, precision(module)))
    return Sidecar(
        targets,
        {t.path: names[t.path] for t in targets},
        fingerprints,
        {path: one.report for path, one in initial.items()},
        fixed={path: fingerprint(A) for path, (A, _) in fixed.items()},
        protection={path: about for path, (_, about) in fixed.items()},
        frozen=frozen_fingerprints(model, targets),
    )


def _train_in_full(model: nn.Module, targets: Sequence[Target]) -> nn.Module:
    model.requires_grad_(False)
    for target in targets:
        model.get_submodule(target.path).requires_grad_(True)
    model.milora_targets = list(targets)  # type: ignore[assignment]
    model.milora_report = []  # type: ignore[assignment]
    model.milora_protection = {}  # type: ignore[assignment]
    return model
