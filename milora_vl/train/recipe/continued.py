"""`--adapter FOLDER` and `--after FOLDER`: what a run takes from an adapter, and what cannot differ from it.

With `--adapter` the adapter trains further: it decides what trains and on which base. The data, the schedule and the
rates come from the new run. With `--after` a new adapter trains on the sum, by the same rules unless others are set.
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
    has_config,
    holds_llava_adapter,
    holds_projector_alone,
    holds_residual,
    require_adapter,
)
from milora_vl.core.policy import Policy, Rule, Target
from milora_vl.core.policy.rules import METHODS
from milora_vl.models.recipe_of_run import recipe_of_run
from milora_vl.train.recipe.policy_edits import PolicyEdits, edited
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


def settings_of(folder: Path, flag: str = "--adapter") -> dict[str, Any]:
    """Return the settings of the adapter in `folder`, as a recipe: of its run, or what its own files say.

    Raises UserError if `folder` holds no adapter that `flag` takes.
    """
    # It imports torch, which --help does not need.
    from milora_vl.core.adapter.sidecar import FILE_NAME, read_sidecar, require_trainable

    if flag == "--after" and (folder / "config.json").is_file() and not has_config(folder):
        raise UserError(
            f"{folder} holds a whole model, without an adapter",
            code="adapter-missing",
            where=flag,
            hint=f"train on it as a base:  --model {folder}",
        )
    require_adapter(folder, flag, "milora_vl.train", flag)
    if holds_projector_alone(folder):
        raise UserError(
            f"{folder} holds a projector alone",
            code="adapter-missing",
            where=flag,
            hint=f"use  --projector_weights {folder}",
        )
    is_other = holds_residual(folder) or holds_llava_adapter(folder)
    sidecar = None if is_other else read_sidecar(folder)
    if sidecar is None:
        why = "is in the layout of another program" if is_other else f"has no {FILE_NAME}, which lists what trains"
        raise UserError(
            f"{folder} {why}",
            code="adapter-plain-lora",
            where=flag,
            hint=to_merge(folder),
        )
    require_trainable(folder, sidecar, is_trainable=flag == "--adapter")
    run = recipe_of_run(folder)
    if not run.get("policy"):  # saved in Python
        rules = [_rule_of(target) for target in sidecar.targets]
        return {"model": base_of(folder), "policy": rules}
    run["model"] = from_there(folder, str(run.get("model") or base_of(folder)))
    return {**{name: value for name, value in run.items() if name in TAKEN}, **_of_sections(run)}


def _of_sections(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        section: {name: value for name, value in run.get(section, {}).items() if name in names}
        for section, names in OF_SECTIONS.items()
    }


def settings_after(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the settings that a run takes from the run in `folder`, whose update it keeps, and a note, if any.

    A module that trained in full gets an adapter like the others. Rules without protection get the default method.
    Raises UserError as `settings_of`.
    """
    settings = settings_of(folder, "--after")
    if calibration := settings.get("calibration"):
        kept = {name: value for name, value in calibration.items() if name != "earlier"}
        settings["calibration"] = kept if kept.get("data") else {**kept, "image_folder": None}
    rules = [Rule.model_validate(rule) for rule in settings["policy"]]
    adapter = next(rule for rule in rules if rule.method not in (None, "full", "frozen"))
    settings["policy"] = [
        {**(adapter if rule.method == "full" else rule).model_dump(exclude_none=True), "modules": rule.modules}
        for rule in rules
    ]
    if any(rule.in_force().get("protect") for rule in rules):
        return settings, ""
    settings["policy"] = edited(settings["policy"], PolicyEdits(method="milora"))
    return settings, (
        f"note: {folder} was trained without protection, so it has moved what the base knew already; without other "
        "rules this run trains with method milora and protects what is left"
    )


def settings_resumed(run: Path) -> dict[str, Any]:
    """Return the settings of a run with `--after` that resumes: from its own folder, the earlier one may be gone."""
    recipe = recipe_of_run(run)
    return {name: value for name, value in recipe.items() if name in TAKEN} | _of_sections(recipe)


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
