"""`--adapter FOLDER`: what a run takes from the adapter that it trains further, and what cannot differ from it.

The adapter decides what trains and on which base. The data, the schedule and the rates come from the new run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from milora_vl.common.cli.command_line import command_line
from milora_vl.common.errors import Key, Problem, UserError
from milora_vl.core.adapter.folders import (
    base_of,
    from_there,
    holds_llava_adapter,
    holds_projector_alone,
    holds_residual,
    require_adapter,
)
from milora_vl.core.policy import Policy, Target
from milora_vl.core.policy.methods import METHODS
from milora_vl.models.recipe_of_run import recipe_of_run
from milora_vl.train.recipe.schema import Recipe

# The keys of a recipe that describe a model and its inputs. The keys of FIXED are parts of the adapter itself.
FIXED = ("template", "calibration")
TAKEN = (
    "model", "parts", "projector_weights", "quantization", "quant_type", "double_quant", "dtype",
    "attn_implementation", "policy", *FIXED,
)  # fmt: skip
OF_SECTIONS = {
    "data": (
        "max_length",
        "image_aspect_ratio",
        "min_pixels",
        "max_pixels",
        "video_min_pixels",
        "video_max_pixels",
        "fps",
        "num_frames",
    ),
    "train": ("bf16", "fp16"),
}
RATES = ("learning_rate", "weight_decay")


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings of the adapter in `folder`, as a recipe: of its run, or what its own files say.

    Raises UserError if `folder` holds no adapter that can train further.
    """
    from milora_vl.core.adapter.sidecar import FILE_NAME, read_sidecar  # they import torch, and --help needs neither

    require_adapter(folder, "--adapter", "milora_vl.train", "--adapter")
    if holds_projector_alone(folder):
        raise UserError(
            f"{folder} holds a projector alone",
            code="adapter-missing",
            where="--adapter",
            hint=f"use  --projector_weights {folder}",
        )
    is_other = holds_residual(folder) or holds_llava_adapter(folder)
    sidecar = None if is_other else read_sidecar(folder)
    if sidecar is None:
        why = "is in the layout of another program" if is_other else f"has no {FILE_NAME}, which lists what trains"
        raise UserError(
            f"{folder} {why}",
            code="adapter-plain-lora",
            where="--adapter",
            hint=to_merge(folder),
        )
    run = recipe_of_run(folder)
    if not run.get("policy"):  # saved in Python
        rules = [_rule_of(target) for target in sidecar.targets]
        return {"model": base_of(folder), "policy": rules}
    run["model"] = from_there(folder, str(run.get("model") or base_of(folder)))
    sections = {
        section: {name: value for name, value in run.get(section, {}).items() if name in names}
        for section, names in OF_SECTIONS.items()
    }
    return {**{name: value for name, value in run.items() if name in TAKEN}, **sections}


def _rule_of(target: Target) -> dict[str, Any]:
    """Return a rule for the module of a target.

    >>> _rule_of(Target(path="lm.q", shape=(4, 4), tower="language", method="lora", rank=2, alpha=2.0))
    {'modules': 'lm.q', 'method': 'lora', 'rank': 2, 'alpha': 2.0}
    """
    share = METHODS[target.method].protect
    defaults = Target(path="", shape=(), tower=None, method=target.method, protect=share).to_dict()
    fields = {name: value for name, value in target.to_dict().items() if value != defaults[name]}
    rule = {name: value for name, value in fields.items() if name not in ("path", "shape", "tower")}
    return {"modules": target.path, "method": target.method, **rule}


def contradictions(adapter: str, settings: Mapping[str, Any], recipe: Recipe) -> list[Problem]:
    """Return the settings of a recipe that contradict the adapter's `settings`; other rates do not."""
    before = Recipe.parse(settings)
    pairs = [(Key.of(name), getattr(before, name), getattr(recipe, name)) for name in FIXED if name in settings]
    old, new = (_without_rates(rules.policy or []) for rules in (before, recipe))
    if [rule["modules"] for rule in old] != [rule["modules"] for rule in new]:
        pairs.append((Key.of("policy"), _modules(old), _modules(new)))
    else:
        for number, (rule, other) in enumerate(zip_longest(old, new)):
            names = dict.fromkeys((*rule, *other))
            if _scale(rule) == _scale(other):  # another rank changes alpha, too
                names.pop("alpha", None)
            pairs += [(Key(("policy", number, name)), rule.get(name), other.get(name)) for name in names]
    found = [
        Problem(f"the adapter {adapter} has {has}, got {got}", "adapter-other-settings", key)
        for key, has, got in pairs
        if has != got
    ]
    if found:
        hint = f"remove the setting, or train on the merged model:\n{to_merge(Path(adapter))}"
        found[0] = replace(found[0], hint=hint)
    return found


def _without_rates(rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in rule.in_force().items() if k not in RATES} for rule in Policy.parse(list(rules)).rules]


def _scale(rule: Mapping[str, Any]) -> float:
    return float(rule.get("alpha") or rule.get("rank") or 1) / (rule.get("rank") or 1)


def _modules(rules: Sequence[Mapping[str, Any]]) -> str:
    return f"{len(rules)} rules" if len(rules) > 3 else f"rules for {', '.join(rule['modules'] for rule in rules)}"


def to_merge(adapter: Path) -> str:
    """Return the command that makes a base model of an adapter, for training with other rules."""
    command = command_line("milora_vl.export", adapter, "--to", "merged", "--output_dir", "MERGED")
    return f"{command}\nthen  --model MERGED"
