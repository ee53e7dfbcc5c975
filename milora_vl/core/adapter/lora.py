"""PEFT's LoRA: its LoraConfig from targets, and its layers in a model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from milora_vl.common.errors import UserError, first_line
from milora_vl.core.adapter.folders import CONFIG, RESTORE, AdapterError
from milora_vl.core.policy.rules import Target
from milora_vl.core.policy.towers import peft_task
from milora_vl.core.weights.tensor_files import unreadable


def make_lora(model: nn.Module, targets: Sequence[Target]) -> PeftModel:
    """Return `model` with PEFT's LoRA on the targets that have a rank; `full` targets become modules_to_save.

    A target with an anchor gets rank 2r and alpha 2 alpha, so that the scaling alpha/r stays the same.
    Raises AdapterError if PEFT's name matching would adapt other modules too.
    """
    adapters = [t for t in targets if t.rank is not None]
    full = [t.path for t in targets if t.method == "full"]
    _require_distinct(model, full)
    config = config_of_targets(model, adapters, full)
    with quiet_peft():
        tuned = get_peft_model(model, config)
    _require_exactly(tuned, {t.path: peft_rank(t) for t in adapters})
    if isinstance(config.target_modules, set):
        # PEFT shortens long lists to suffixes that are unique in this model. Full paths hold for any model.
        config.target_modules = {t.path for t in adapters}
    return tuned


@contextmanager
def quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT corrects the value for each layer. A policy may select layers of both kinds.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # PEFT uses a deprecated name of transformers.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


@contextmanager
def read_by_peft(base: nn.Module, folder: Path) -> Iterator[None]:
    """Raise AdapterError for what PEFT, torch and safetensors raise or warn about when they read `folder`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            yield
    except UserError:
        raise
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise AdapterError(problems=[unreadable(folder, error)]) from error
    except (UserWarning, KeyError) as error:  # PEFT's KeyError names a module of modules_to_save
        message = f"the weights lack modules that {CONFIG} lists: {first_line(error)}"
        raise AdapterError(message, where=str(folder), hint=RESTORE) from error
    except (RuntimeError, ValueError, TypeError) as error:  # a text of many lines
        message = f"the adapter does not fit {type(base).__name__}: {' '.join(str(error).split())[:300]}"
        hint = "load the base model that the adapter was trained on"
        raise AdapterError(message, where=str(folder), hint=hint) from error


def config_of_targets(model: nn.Module, adapters: Sequence[Target], full: list[str]) -> LoraConfig:
    """Return PEFT's config for a LoRA on `adapters`, with the modules at the paths `full` trained in full."""
    use_rslora = all(t.rslora for t in adapters)  # PEFT has a single switch for all modules
    ranks = {t.path: peft_rank(t) for t in adapters}
    alphas = {t.path: _peft_alpha(t, use_rslora) for t in adapters}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=_most_common({t.path: t.dropout for t in adapters}),
        target_modules=_target_modules(model, list(ranks)),
        rank_pattern={f"^{path}": r for path, r in ranks.items() if r != rank},
        alpha_pattern={f"^{path}": a for path, a in alphas.items() if a != alpha},
        modules_to_save=full or None,
        use_rslora=use_rslora,
        use_dora=adapters[0].method == "dora",
        fan_in_fan_out=isinstance(base_layer(model, adapters[0].path), Conv1D),
        task_type=peft_task(model),
    )


def _target_modules(model: nn.Module, paths: list[str]) -> list[str] | str:
    """Return full paths, or one regular expression where PEFT's suffix matching would find other modules too."""
    wanted, endings = set(paths), tuple(f".{path}" for path in paths)
    if any(name.endswith(endings) for name, _ in model.named_modules() if name not in wanted):
        return "|".join(path.replace(".", r"\.") for path in paths)
    return paths


def _require_distinct(model: nn.Module, full: list[str]) -> None:
    """Raise AdapterError if PEFT would train other modules in full: it matches the ends of names, not whole parts."""
    extra = [name for name, _ in model.named_modules() if name.endswith(tuple(full)) and name not in full]
    if full and extra:
        names = ", ".join(full[:3])
        message = f"PEFT would train {extra[0]} in full as well, because its name ends like one of {names}"
        hint = f"use an adapter instead of method full for {names}, or no adapters at all"
        raise AdapterError(message, where=extra[0], hint=hint)


def _require_exactly(tuned: PeftModel, ranks: Mapping[str, int]) -> None:
    modules = tuned.get_base_model().named_modules()
    adapted = {name: module.r["default"] for name, module in modules if isinstance(module, LoraLayer)}
    if adapted != dict(ranks):
        differ = sorted(name for name in adapted.keys() | ranks.keys() if adapted.get(name) != ranks.get(name))
        both = f"this one has rank {adapted.get(differ[0])}, expected {ranks.get(differ[0])}"
        message = f"PEFT matched unexpected modules: {both} ({len(differ):,} modules differ)"
        raise AdapterError(message, where=differ[0], hint="reload the base model and try again")


def peft_rank(target: Target) -> int:
    """Return the rank that PEFT stores: 2r with an anchor."""
    assert target.rank is not None
    return target.rank * (2 if target.has_anchor else 1)


def _peft_alpha(target: Target, use_rslora: bool) -> int | float:
    """Return the alpha that keeps the target's scaling at PEFT's rank: 2 alpha at 2r, sqrt(2) alpha with rsLoRA."""
    rank = peft_rank(target)
    alpha = target.scaling * (rank**0.5 if use_rslora else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def lora_layer(model: PeftModel, path: str) -> LoraLayer:
    """Return PEFT's LoRA layer at a module path of the base model. Raises AdapterError if it has been merged."""
    layer = model.get_base_model().get_submodule(path)
    if not isinstance(layer, LoraLayer):
        message = f"this layer has no adapter any more: it is a {type(layer).__name__}"
        hint = "after merge(model), save what it returned with its save_pretrained"
        raise AdapterError(message, where=path, hint=hint)
    return layer


def base_model_of(model: nn.Module) -> nn.Module:
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def base_layer(model: nn.Module, path: str) -> nn.Module:
    layer = base_model_of(model).get_submodule(path)
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def set_dropout(layer: LoraLayer, adapter: str, probability: float) -> None:
    was_training = layer.lora_dropout.training
    layer.lora_dropout[adapter] = nn.Dropout(probability) if probability > 0 else nn.Identity()
    layer.lora_dropout.train(was_training)


def require_module(model: object) -> None:
    """Raise AdapterError unless `model` is a torch module; users pass the name of a model here."""
    if not isinstance(model, nn.Module):
        hint = "load it:  model, processor = load_model(NAME)"
        raise AdapterError(f"expected a model (a torch.nn.Module), got {model!r:.80}", hint=hint)
