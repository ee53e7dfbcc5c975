"""PEFT's config for a list of targets, and the LoRA that PEFT makes of it, checked module by module."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from milora_vl.lora.errors import AdapterError
from milora_vl.policy.rules import Target
from milora_vl.towers import peft_task


def make_lora(model: nn.Module, targets: Sequence[Target]) -> PeftModel:
    """Return `model` with PEFT's LoRA on exactly the targets that have a rank; `full` ones become modules_to_save.

    Where there is an anchor the rank is 2r and alpha is doubled too, so that the scaling alpha/r stays.
    Raises AdapterError where PEFT's name rules would adapt other modules as well.
    """
    adapters = [t for t in targets if t.rank is not None]
    full = [t.path for t in targets if t.method == "full"]
    _require_distinct(model, full)
    config = _config(model, adapters, full)
    with quiet_peft():
        tuned = get_peft_model(model, config)
    _require_exactly(tuned, {t.path: _peft_rank(t) for t in adapters})
    if isinstance(config.target_modules, set):
        # PEFT shortens long lists to endings that are unique in this model; full paths say what was adapted.
        config.target_modules = {t.path for t in adapters}
    return tuned


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep back warnings of PEFT that no user can act on."""
    with warnings.catch_warnings():
        # PEFT settles this per layer by itself; a policy may name layers of both kinds.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # PEFT asks transformers by an old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def _config(model: nn.Module, adapters: Sequence[Target], full: list[str]) -> LoraConfig:
    use_rslora = all(t.rslora for t in adapters)  # PEFT has one switch for all modules
    ranks = {t.path: _peft_rank(t) for t in adapters}
    alphas = {t.path: _peft_alpha(t, use_rslora) for t in adapters}
    method = adapters[0].method
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
        use_dora=method == "dora",
        init_lora_weights="mica" if method == "mica" else True,
        fan_in_fan_out=isinstance(model.get_submodule(adapters[0].path), Conv1D),
        task_type=peft_task(model),
    )


def _target_modules(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The full paths; as a regular expression where PEFT's rule for endings would match other modules too."""
    wanted, endings = set(paths), tuple(f".{path}" for path in paths)
    if any(name.endswith(endings) for name, _ in model.named_modules() if name not in wanted):
        return "|".join(path.replace(".", r"\.") for path in paths)
    return paths


def _require_distinct(model: nn.Module, full: list[str]) -> None:
    """PEFT matches modules_to_save by the end of names, even of parts of names."""
    taken = [name for name, _ in model.named_modules() if name.endswith(tuple(full)) and name not in full]
    if full and taken:
        raise AdapterError(
            f"PEFT would train {taken[0]} in full as well, as its name ends like one of {', '.join(full[:3])}\n"
            "train it by an adapter, or nothing but these in full (then PEFT is not needed)"
        )


def _require_exactly(tuned: PeftModel, ranks: Mapping[str, int]) -> None:
    modules = tuned.get_base_model().named_modules()
    made = {name: module.r["default"] for name, module in modules if isinstance(module, LoraLayer)}
    if made != dict(ranks):
        differ = sorted(name for name in made.keys() | ranks.keys() if made.get(name) != ranks.get(name))
        raise AdapterError(
            f"PEFT adapted other modules than asked for: {differ[0]} has rank {made.get(differ[0])}, not "
            f"{ranks.get(differ[0])} ({len(differ):,} differ)\ndo names of modules confuse PEFT? load the model anew"
        )


def _peft_rank(target: Target) -> int:
    assert target.rank is not None
    return target.rank * (2 if target.has_anchor else 1)


def _peft_alpha(target: Target, use_rslora: bool) -> int | float:
    """The alpha that gives the target's scaling at PEFT's rank: 2 alpha at 2r, alpha sqrt(2) with rsLoRA."""
    rank = _peft_rank(target)
    alpha = target.scaling * (rank**0.5 if use_rslora else rank)
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
