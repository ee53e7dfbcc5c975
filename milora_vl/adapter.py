"""Apply MiLoRA to a model (arXiv:2406.09044): PEFT makes a LoRA of rank 2r, its factors become trained half and anchor.

The base model is never changed; what is returned is a PeftModel that any trainer accepts.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from milora_vl.fingerprint import sketch
from milora_vl.initialize import initialize
from milora_vl.install import install, lora_layer
from milora_vl.peft_model import adopt, find_names, set_dropout
from milora_vl.policy import Policy, Rule, Target
from milora_vl.sidecar import AdapterError, Sidecar
from milora_vl.towers import is_generative, is_wrapped_by_peft
from milora_vl.weights import read_matrix

Form = Literal["anchored", "residual"]


def apply_milora(
    model: nn.Module,
    policy: Policy | str | Sequence[Mapping[str, Any] | Rule],
    *,
    form: Form = "anchored",
    progress: bool = False,
) -> Any:
    """Adapt `model` as the policy says and return it as a PeftModel; its output is unchanged until it is trained.

    A policy of `full` and `frozen` rules alone returns the model itself, with requires_grad set. Either way the result
    has `milora_targets` (one Target per module that trains) and `milora_report` (one LayerReport per decomposed
    weight). `progress` shows a bar on stderr. The model is changed only after every weight has been decomposed.

    Raises PolicyError for rules that do not fit the model, ValueError for weights that cannot be decomposed,
    AdapterError for models that hold an adapter already.

    >>> rules = [{"modules": "language", "method": "milora", "rank": 2, "dropout": 0.05}]
    >>> tuned = apply_milora(nn.Sequential(nn.Linear(4, 4)), rules)
    >>> tuned.milora_report[0].rank, tuned.base_model.model[0].lora_A["default"].weight.shape
    (2, torch.Size([4, 4]))
    """
    if form != "anchored":
        raise AdapterError(f"form must be 'anchored' in this version, got {form!r}")
    if is_wrapped_by_peft(model):
        raise AdapterError("this model holds a PEFT adapter already: pass the base model, or unload the adapter first")
    targets = Policy.parse(policy).resolve(model)
    if all(target.rank is None for target in targets):
        return _train_in_full(model, targets)
    initial = initialize(model, targets, progress=progress)
    sketches = {path: made.sketch for path, made in initial.items()}
    sketches |= {t.path: sketch(read_matrix(model.get_submodule(t.path))) for t in targets if t.method == "lora"}
    names = find_names(model)
    sidecar = Sidecar(
        form,
        targets,
        {t.path: names[t.path] for t in targets},
        sketches,
        {path: made.report for path, made in initial.items()},
    )
    tuned = adopt(_make_lora(model, targets))
    for target in targets:
        if target.rank is not None:
            set_dropout(lora_layer(tuned, target.path), "default", target.dropout)
    for path, made in initial.items():
        install(lora_layer(tuned, path), "default", made.A0, made.B0)
    tuned.remember("default", sidecar)
    return tuned


def merge(model: PeftModel, path: str | Path | None = None) -> nn.Module:
    """Return the base model with the adapter merged into its weights; with `path`, save it there too.

    The PeftModel is used up, as by PEFT's merge_and_unload. Raises AdapterError if `model` is no PeftModel.
    """
    if not isinstance(model, PeftModel):
        raise AdapterError(f"merge needs a PeftModel, got {type(model).__name__}")
    merged = model.merge_and_unload()
    if path is not None:
        if not is_generative(merged):
            raise AdapterError(f"{type(merged).__name__} has no save_pretrained: save its state dict yourself")
        merged.save_pretrained(path)
    return merged


def _train_in_full(model: nn.Module, targets: Sequence[Target]) -> nn.Module:
    """No adapter at all: the modules themselves train, everything else is frozen."""
    model.requires_grad_(False)
    for target in targets:
        model.get_submodule(target.path).requires_grad_(True)
    model.milora_targets = list(targets)  # type: ignore[assignment]
    model.milora_report = []  # type: ignore[assignment]
    return model


def _make_lora(model: nn.Module, targets: Sequence[Target]) -> PeftModel:
    """PEFT's LoRA on exactly the targets: rank 2r and alpha 2 alpha where there is an anchor, so the scaling stays."""
    adapters = [t for t in targets if t.rank is not None]
    config = _lora_config(model, adapters, [t.path for t in targets if t.method == "full"])
    with warnings.catch_warnings():
        # PEFT settles this per layer by itself; a policy may name both kinds.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        tuned = get_peft_model(model, config)
    _require_exactly(tuned, {t.path: _peft_rank(t) for t in adapters})
    if not isinstance(config.target_modules, str):
        # PEFT shortens long lists to suffixes that are unique in this model; full paths say what was adapted.
        config.target_modules = {t.path for t in adapters}
    return tuned


def _lora_config(model: nn.Module, adapters: Sequence[Target], full: list[str]) -> LoraConfig:
    ranks = {t.path: _peft_rank(t) for t in adapters}
    alphas = {t.path: _peft_alpha(t) for t in adapters}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=_most_common({t.path: t.dropout for t in adapters}),
        target_modules=_target_modules(model, list(ranks)),
        rank_pattern={f"^{path}": r for path, r in ranks.items() if r != rank},
        alpha_pattern={f"^{path}": a for path, a in alphas.items() if a != alpha},
        modules_to_save=full or None,
        fan_in_fan_out=isinstance(model.get_submodule(adapters[0].path), Conv1D),
        task_type="CAUSAL_LM" if is_generative(model) else None,
    )


def _target_modules(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The full paths; as a regular expression where PEFT's suffix rule would match other modules too."""
    others = [name for name, _ in model.named_modules() if name not in set(paths)]
    endings = tuple(f".{path}" for path in paths)
    if any(name.endswith(endings) for name in others):
        return "|".join(path.replace(".", r"\.") for path in paths)
    return paths


def _require_exactly(tuned: PeftModel, ranks: Mapping[str, int]) -> None:
    """Whatever rules PEFT matches names by: the adapted layers must be ours, at the ranks we asked for."""
    made = {
        name: module.r["default"]
        for name, module in tuned.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }
    if made != dict(ranks):
        differ = sorted(name for name in made.keys() | ranks.keys() if made.get(name) != ranks.get(name))
        raise AdapterError(
            f"PEFT adapted other modules than asked for: {differ[0]} has rank {made.get(differ[0])} instead of "
            f"{ranks.get(differ[0])} ({len(differ):,} differ); do modules share a name that PEFT confuses?"
        )


def _peft_rank(target: Target) -> int:
    assert target.rank is not None
    return target.rank * (1 if target.part is None else 2)


def _peft_alpha(target: Target) -> int | float:
    assert target.alpha is not None
    alpha = target.alpha * (1 if target.part is None else 2)
    return int(alpha) if float(alpha).is_integer() else alpha


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
