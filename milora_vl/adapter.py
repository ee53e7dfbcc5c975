"""Apply MiLoRA to a model (arXiv:2406.09044): PEFT makes a LoRA of rank 2r, its factors become trained half and anchor.

In the anchored form the base model is never changed; what is returned is a PeftModel that any trainer accepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftModel
from torch import nn

from milora_vl.initialize import Initial, Progress, initialize, start_olora
from milora_vl.lora.base_check import precision, require_readable
from milora_vl.lora.config import make_lora
from milora_vl.lora.errors import AdapterError, require_module
from milora_vl.lora.install import has_halves, install, lora_layer, set_dropout, trained_factors
from milora_vl.lora.peft_model import adopt
from milora_vl.lora.protection import Protected, find_protected, kept_outside
from milora_vl.lora.residual import make_residual, require_residual
from milora_vl.lora.sidecar import Sidecar
from milora_vl.policy import Policy, Rule, Target
from milora_vl.towers import can_save, canonical_names, is_wrapped_by_peft
from milora_vl.weights.fingerprint import sketch
from milora_vl.weights.matrices import read_matrix

Form = Literal["anchored", "residual"]


def apply_milora(
    model: nn.Module,
    policy: Policy | str | Sequence[Mapping[str, Any] | Rule],
    *,
    form: Form = "anchored",
    cache_dir: str | Path | None = None,
    progress: Progress = False,
) -> Any:
    """Adapt `model` as the policy says and return it as a PeftModel; its output is unchanged until it is trained.

    A policy of `full` and `frozen` rules alone returns the model itself, with requires_grad set. Either way the result
    has `milora_targets` (one Target per module that trains) and `milora_report` (one LayerReport per decomposed
    weight). Factors and spectra are kept in `cache_dir` and taken from there. `progress` shows a bar on stderr,
    "lines" a line per layer too. The model is changed only after every weight has been decomposed.

    Raises PolicyError for rules that do not fit the model, ValueError for weights that cannot be decomposed,
    AdapterError for models that hold an adapter already or do not fit the form.

    >>> rules = [{"modules": "language", "method": "milora", "rank": 2, "dropout": 0.05}]
    >>> tuned = apply_milora(nn.Sequential(nn.Linear(4, 4)), rules)
    >>> tuned.milora_report[0].rank, tuned.base_model.model[0].lora_A["default"].weight.shape
    (2, torch.Size([4, 4]))
    """
    if form not in get_args(Form):
        raise AdapterError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
    require_module(model)
    if is_wrapped_by_peft(model):
        raise AdapterError("this model holds a PEFT adapter already: pass the base model, or unload the adapter first")
    require_readable(model)
    return apply_targets(
        model,
        Policy.parse_and_resolve(policy, model, cache_dir=cache_dir),
        form=form,
        cache_dir=cache_dir,
        progress=progress,
    )


def apply_targets(
    model: nn.Module,
    targets: Sequence[Target],
    *,
    form: Form = "anchored",
    cache_dir: str | Path | None = None,
    progress: Progress = False,
) -> Any:
    """Do what `apply_milora` does, on a fresh model that the policy has been settled on already.

    Where a rank comes from a spectrum, settling decomposes every weight.
    """
    if all(target.rank is None for target in targets):
        return _train_in_full(model, targets)
    if form == "residual":
        _require_residual(model, targets)
    initial = initialize(model, targets, cache_dir=cache_dir, progress=progress) | start_olora(model, targets)
    protected = find_protected(model, targets, cache_dir=cache_dir, progress=progress)
    initial = kept_outside(initial, protected)
    sidecar = _describe(model, targets, initial, form)
    tuned = adopt(make_lora(model, targets))
    for target in targets:
        if target.rank is not None:
            set_dropout(lora_layer(tuned, target.path), "default", target.dropout)
    for path, made in initial.items():
        install(lora_layer(tuned, path), "default", made.A0, made.B0)
    _start_outside(tuned, protected)
    if form == "residual":
        drift = {path: make_residual(lora_layer(tuned, path), "default") for path in initial}
        reports = {path: replace(report, drift=drift[path]) for path, report in sidecar.reports.items()}
        sidecar = replace(sidecar, reports=reports)
    tuned.remember("default", sidecar)
    tuned.protect("default", protected)
    return tuned


def merge(model: PeftModel, path: str | Path | None = None) -> nn.Module:
    """Return the base model with the adapter merged into its weights; with `path`, save it there too.

    The PeftModel is used up, as by PEFT's merge_and_unload. Raises AdapterError if `model` is no PeftModel, or if it
    is to be saved and cannot save itself.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError(f"merge needs a PeftModel, got {type(model).__name__}")
    if path is not None and not can_save(model.get_base_model()):
        name = type(model.get_base_model()).__name__
        raise AdapterError(f"{name} has no save_pretrained: call merge(model) and save its state dict yourself")
    merged = model.merge_and_unload()
    if path is not None:
        merged.save_pretrained(path)
    return merged


def _describe(model: nn.Module, targets: Sequence[Target], initial: Mapping[str, Initial], form: str) -> Sidecar:
    """Everything milora.json will say, while the weights are still those of the base."""
    names = canonical_names(model)
    sketches = {path: made.sketch for path, made in initial.items()}
    sketches |= {
        t.path: sketch(read_matrix(model.get_submodule(t.path)))
        for t in targets
        if t.rank is not None and t.path not in initial
    }
    for path, made in sketches.items():
        sketches[path] = replace(made, eps=max(made.eps, precision(model.get_submodule(path))))
    reports = {path: made.report for path, made in initial.items()}
    return Sidecar(form, targets, {t.path: names[t.path] for t in targets}, sketches, reports)


def _start_outside(tuned: PeftModel, protected: Mapping[str, Protected]) -> None:
    """Take PEFT's random start out of protected directions; an anchored start is outside already."""
    for path, found in protected.items():
        layer = lora_layer(tuned, path)
        if found.protect.is_hard and not has_halves(layer, "default"):
            found.remove(trained_factors(layer, "default"))


def _require_residual(model: nn.Module, targets: Sequence[Target]) -> None:
    require_residual(model, [t.path for t in targets if t.has_anchor])
    free = [t.path for t in targets if t.sigma != "keep"]
    if free:
        raise AdapterError(
            f"{free[0]}: sigma other than keep needs form anchored: W_p would not be W less its minor part"
        )


def _train_in_full(model: nn.Module, targets: Sequence[Target]) -> nn.Module:
    """No adapter at all: the modules themselves train, everything else is frozen."""
    model.requires_grad_(False)
    for target in targets:
        model.get_submodule(target.path).requires_grad_(True)
    model.milora_targets = list(targets)  # type: ignore[assignment]
    model.milora_report = []  # type: ignore[assignment]
    return model
