"""From the command line and a recipe file to the one recipe that the run follows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llava_recipes
from milora_data.command import suggest
from milora_data.errors import Problem, UserError
from milora_vl import checkpoints
from milora_vl.models import loading
from milora_vl.models.devices import fastest_dtype, train_device
from milora_vl.models.names import UnknownModelError
from milora_vl.recipe import base_model, llava_flags, protection, yaml_file
from milora_vl.recipe.arguments import PROG, Request
from milora_vl.recipe.hf_arguments import overridden
from milora_vl.recipe.on_model import of_default_rank, problems_on, require_float_weights
from milora_vl.recipe.policy_edits import ADAPTERS, edited
from milora_vl.recipe.schema import Recipe, RecipeError, located, policy_problems

DECIDES_POLICY = ("lora_enable", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_backbone")


@dataclass(frozen=True, slots=True)
class Settings:
    """The resolved recipe and what the user should hear about how it came about."""

    recipe: Recipe
    source: str  # name or file of the recipe, or "" without one
    implicit_policy: bool  # the rules are our default: a projector rule may go where there is no projector
    batch_in_recipe: tuple[int, int] | None = None  # per device, accumulation
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def resolve(request: Request) -> Settings:
    """Merge recipe, flags and LLaVA's flags, strictly. UserError, with everything that is wrong in them."""
    try:
        return _resolve(request)
    except RecipeError as error:
        source, lines, found = problems_on_model(request, _config_named(request))
        known = set(error.dotted)
        new = located([p for p in found if p not in known], source, lines)
        new += located([p for p in _problems_of_flags(request) if p not in known], "the command line", {})
        raise UserError(problems=[*error.problems, *new], source=error.source) from None


def require_fit(request: Request, recipe: Recipe) -> None:
    """Raise RecipeError with everything that the rules say wrongly of the model, before any data or weights load.

    UnknownModelError for a model that is none.
    """

    try:
        config = base_model.config_for(recipe)
    except UnknownModelError:
        raise
    except UserError:
        return  # loading it says why
    source, lines, found = problems_on_model(request, config)
    if found:
        raise RecipeError(source, found, lines)
    protection.check(recipe)
    if recipe.quantization != "none":
        require_float_weights(recipe, config)


def _config_named(request: Request) -> Any:
    """The config of the model that a request names, whatever else is wrong with it; None where it cannot be had."""
    model = request.overrides.get("model") or read_recipe(request.recipe)[0].get("model")
    if not model:
        return None

    try:
        config = loading.config_of(str(model))
    except (UserError, ValueError):
        return None
    is_part = llava_flags.parts(request.llava) and "vision_config" not in config.to_dict()
    return None if is_part else config  # what is composed of parts has no config of its own yet


def problems_on_model(request: Request, config: Any) -> tuple[str, dict[str, int], list[Problem]]:
    """What is wrong with the rules, as the flags leave them, on the model of that config.

    Returns the source of the rules and the lines in it too.
    """
    given, source, lines = _rules_of(request)
    is_list = isinstance(given, list) and all(isinstance(rule, Mapping) for rule in given)
    if config is None or not (given is None or is_list):  # the latter is a problem of the recipe itself
        return source, {}, []
    try:
        rules = edited(given, request.edits)
    except UserError as error:
        return source, {}, list(error.problems)
    if given is None or len(rules) != len(given):
        lines = {}
    found = problems_on(rules, config, implicit=given is None)
    if given is None and request.edits.rank is None:
        found = of_default_rank(found)
    return source, lines, found


def _rules_of(request: Request) -> tuple[Any, str, dict[str, int]]:
    """The rules before the flags change them, unchecked; the name of their source, and its lines. None: the default."""
    if request.policy is not None:
        return *_read_policy(request.policy), {}
    content, lines, source = read_recipe(request.recipe)
    meaning = _llava(request)
    if meaning and meaning.rules:
        return meaning.rules, "the command line", {}
    return content.get("policy"), source, lines


def _problems_of_flags(request: Request) -> Sequence[Problem]:
    """What is wrong with the flags by themselves: the recipe's own problems come first, and would hide it."""
    try:
        Recipe.parse(request.overrides, "the command line")
    except RecipeError as error:
        return error.dotted
    return []


def _resolve(request: Request) -> Settings:
    given, lines, source = read_recipe(request.recipe)
    base = Recipe.parse(given, source, lines)
    meaning = _llava(request)
    content = base.model_dump() | {"train": overridden(base.train, request.overrides.get("train", {}))}
    merged = _merge(content, request.overrides)
    notes_on_pictures: list[str] = []
    if meaning and meaning.quantization:
        merged["quantization"] = meaning.quantization
    if request.llava and request.llava.get("group_by_modality_length"):
        merged["train"].setdefault("train_sampling_strategy", "group_by_length")
    merged["parts"] = {**merged["parts"], **llava_flags.parts(request.llava)}
    if llava_flags.is_script(request.llava) and not request.recipe and not _gives(request, "data.image_aspect_ratio"):
        merged["data"]["image_aspect_ratio"] = "plain"
        notes_on_pictures = ["LLaVA flags: no --image_aspect_ratio means pictures cropped to a square"]
    rules = _policy(request, base, meaning)
    implicit = rules is None
    merged["policy"] = edited(rules, request.edits)
    recipe = Recipe.parse(merged, "the command line" if not request.recipe else f"{source} and the command line")
    if not recipe.model:
        raise UserError(f"no model is named: --model NAME, or a --recipe that names one\nsee: {PROG} --list-models")
    if recipe.dtype == "fastest":  # what a run was made in belongs into its recipe, whatever the next machine is
        fastest = str(fastest_dtype(train_device(recipe.train))).removeprefix("torch.")
        recipe = recipe.model_copy(update={"dtype": _dtype_of_resumed(request) or fastest})
    per_device = base.train.get("per_device_train_batch_size")
    batch = (int(per_device), int(base.train.get("gradient_accumulation_steps", 1))) if per_device else None
    notes = [meaning.line] if meaning and meaning.line else []
    warnings = [*(meaning.warnings if meaning else []), *base_model.warnings(recipe)]
    return Settings(recipe, request.recipe or "", implicit, batch, [*notes, *notes_on_pictures], warnings)


def _dtype_of_resumed(request: Request) -> str | None:
    """The dtype of the run that a request goes on with, whatever is the fastest here."""
    if request.resume is None or request.output_dir is None:
        return None
    kept = Path(request.output_dir) / "recipe.yaml"
    if not kept.is_file() or not checkpoints.checkpoints(kept.parent):  # nothing was saved: it begins again
        return None
    return str(yaml_file.read_file(kept)[0].get("dtype", "")) or None


def _gives(request: Request, path: str) -> bool:
    section, _, name = path.partition(".")
    return name in request.overrides.get(section, {})


def read_recipe(name: str | None) -> tuple[dict[str, Any], dict[str, int], str]:
    """Content, lines and label of a recipe given by name or path; empty without one."""
    if name is None:
        return {}, {}, "the command line"
    if name in llava_recipes.names():
        label = f"recipe {name}"
        return (*yaml_file.read(llava_recipes.read(name), label), label)
    path = Path(name) / "recipe.yaml" if Path(name).is_dir() else Path(name)
    if path.is_file():
        return (*yaml_file.read_file(path), str(path))
    near = suggest(name, llava_recipes.names())
    hint = f"did you mean {' or '.join(near)} ?" if near else f"recipes: {', '.join(llava_recipes.names())}"
    raise UserError(f"no recipe {name!r}: neither a name nor a file\n{hint}\nsee: {PROG} --list-recipes")


def _llava(request: Request) -> llava_flags.Meaning | None:
    if not request.llava:
        return None
    given = dict(request.llava)
    if request.recipe or request.policy:
        clash = [f"--{name}" for name in DECIDES_POLICY if given.get(name)]
        if clash:
            decided_by = "recipe" if request.recipe else "policy"
            raise UserError(f"{' '.join(clash)}: the {decided_by} decides that\nuse --method")
    if request.edits.method in ADAPTERS and llava_flags.decide_what_trains(given):
        given["lora_enable"] = True
    edits = request.edits
    found = llava_flags.meaning(given, rank=edits.rank, alpha=edits.alpha, dropout=edits.dropout)
    if request.recipe or request.policy:
        return llava_flags.Meaning([], found.quantization, "", found.warnings)
    return found


def _policy(request: Request, base: Recipe, meaning: llava_flags.Meaning | None) -> list[dict[str, Any]] | None:
    if request.policy is not None:
        return _given_policy(request.policy)
    return meaning.rules if meaning and meaning.rules else base.policy


def _given_policy(text: str) -> list[dict[str, Any]]:
    rules, source = _read_policy(text)
    problems = policy_problems(rules)
    if problems:
        raise RecipeError(source, problems)
    return rules


def _read_policy(text: str) -> tuple[list[dict[str, Any]], str]:
    """The rules of --policy, unchecked, and what to call their source."""
    is_file = os.path.isfile(text)  # noqa: PTH113 - Path's raises where the text is too long for a name
    source = text if is_file else "--policy"
    try:
        body = Path(text).read_text(encoding="utf-8") if is_file else text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {text}: {error}") from None
    if not is_file and text.endswith((".yaml", ".yml")):
        raise UserError(f"--policy {text}: no such file")
    indented = "\n".join("  " + line for line in body.splitlines())
    rules = yaml_file.read(f"policy:\n{indented}", source)[0]["policy"]
    if isinstance(rules, Mapping):
        rules = rules.get("policy", [rules])
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        raise UserError(f"{source}: expected a list of rules, e.g. [{{modules: language, method: milora, rank: 64}}]")
    return [dict(rule) for rule in rules], source


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merge(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), dict) else value
    return out
