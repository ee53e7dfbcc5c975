"""Merge recipe file, flags and LLaVA's flags into one recipe, and check its rules on the model's config."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milora_data.encode.templates import OWN
from milora_vl.adapter import checkpoints
from milora_vl.base.errors import Problem, UserError, at_flag
from milora_vl.cli.command_line import beside
from milora_vl.models import loading
from milora_vl.models.devices import fastest_dtype, train_device
from milora_vl.models.names import UnknownModelError
from milora_vl.recipe import base_model, llava_flags, protection, yaml_file
from milora_vl.recipe.changes import resolved_paths
from milora_vl.recipe.command_line import PROG, Request
from milora_vl.recipe.hf_flags import overridden
from milora_vl.recipe.on_model import of_default_rank, problems_on, require_float_weights, require_pictures
from milora_vl.recipe.places import at_flags, is_typed
from milora_vl.recipe.policy_edits import ADAPTERS, edited
from milora_vl.recipe.schema import Recipe, RecipeError, located, policy_problems

DECIDES_POLICY = ("lora_enable", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_backbone")


@dataclass(frozen=True, slots=True)
class MergedRecipe:
    """The recipe with every flag applied, with notes and warnings for the user."""

    recipe: Recipe
    source: str  # name or file of the recipe, or "" without one
    implicit_policy: bool  # default rules: their projector rule is dropped for a model without projector
    batch_in_recipe: tuple[int, int] | None = None  # per device, accumulation
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def merge_recipe(request: Request) -> MergedRecipe:
    """Merge recipe, flags and LLaVA's flags. Raises UserError with all problems in them."""
    try:
        merged = _merge_recipe(request)
    except RecipeError as error:
        source, lines, problems = problems_on_model(request, _config_named(request))
        known = set(error.dotted)
        new = located([p for p in problems if p not in known], source, lines)
        of_flags = at_flags(_problems_of_flags(request), request)
        new += located([p for p in of_flags if p not in known], "the command line", {})
        raise UserError(problems=[*request.problems, *error.problems, *new], source=error.source) from None
    except UserError as error:
        if not request.problems:
            raise
        raise UserError(problems=[*request.problems, *error.problems]) from None
    if request.problems:
        raise UserError(problems=request.problems)
    return merged


def require_fit(request: Request, recipe: Recipe) -> None:
    """Check the rules on the model, before any data or weights load.

    Raises RecipeError with all problems of the rules, and UnknownModelError if the name is unknown.
    """

    try:
        with at_flag("--model"):
            config = base_model.config_for(recipe)
    except UnknownModelError:
        raise
    except UserError:
        return  # loading the model reports the error
    source, lines, problems = problems_on_model(request, config)
    if problems:
        raise RecipeError(source, problems, lines)
    protection.require_supported(recipe)
    require_pictures(recipe, config)
    if recipe.quantization != "none":
        require_float_weights(recipe, config)


def _config_named(request: Request) -> Any:
    """Return the config of the requested model even if the recipe has problems; None if it is not available."""
    model = request.overrides.get("model") or request.recipe_file.content.get("model")
    if not model:
        return None

    try:
        config = loading.config_of(str(model))
    except (UserError, ValueError):
        return None
    is_part = llava_flags.parts(request.llava) and "vision_config" not in config.to_dict()
    return None if is_part else config  # a composed model has no config yet


def problems_on_model(request: Request, config: Any) -> tuple[str, dict[str, int], list[Problem]]:
    """Return the source of the rules, their lines in it, and their problems on the model of that config."""
    before, source, lines = _rules_of(request)
    is_list = isinstance(before, list) and all(isinstance(rule, Mapping) for rule in before)
    if config is None or not (before is None or is_list):  # the latter is a problem of the recipe itself
        return source, {}, []
    try:
        rules = edited(before, request.edits)
    except UserError as error:
        return source, {}, list(error.problems)
    if before is None or len(rules) != len(before):
        lines = {}
    problems = problems_on(rules, config, implicit=before is None)
    if before is None and request.edits.rank is None:
        problems = of_default_rank(problems)
    return source, lines, at_flags(problems, request)


def _rules_of(request: Request) -> tuple[Any, str, dict[str, int]]:
    """Return the unchecked rules before the flags change them (None: default rules), their source and its lines."""
    if request.policy is not None:
        return *_read_policy(request.policy), {}
    meaning = _llava(request)
    if meaning and meaning.rules:
        return meaning.rules, "the command line", {}
    file = request.recipe_file
    return file.content.get("policy"), file.source, file.lines


def _problems_of_flags(request: Request) -> Sequence[Problem]:
    """Return problems of the flags alone; problems of the recipe stop `_merge_recipe` before it checks the flags."""
    try:
        Recipe.parse(request.overrides, "the command line")
    except RecipeError as error:
        return error.dotted
    return []


def _merge_recipe(request: Request) -> MergedRecipe:
    from_file, source = request.recipe_file.content, request.recipe_file.source
    of_file = Recipe.parse(from_file, source, request.recipe_file.lines)
    llava = _llava(request)
    content = of_file.model_dump() | {"train": overridden(of_file.train, request.overrides.get("train", {}))}
    notes_on_data = _without_evaluation(content, request)
    merged = _merge(content, request.overrides)
    if llava and llava.quantization:
        merged["quantization"] = llava.quantization
    if request.llava and request.llava.get("group_by_modality_length"):
        merged["train"].setdefault("train_sampling_strategy", "group_by_length")
    merged["parts"] = {**merged["parts"], **llava_flags.parts(request.llava)}
    if llava_flags.is_script(request.llava) and not request.recipe and not is_typed(request, "data.image_aspect_ratio"):
        merged["data"]["image_aspect_ratio"] = "plain"
        notes_on_data += ["LLaVA flags: without --image_aspect_ratio images are cropped to a square"]
    if "template" not in from_file and not is_typed(request, "template") and merged["model"]:
        # A model whose processor prepares the pictures has its own prompt format, and no other.
        merged["template"] = OWN if base_model.prepares_with_processor(merged["model"]) else merged["template"]
    rules = _policy(request, of_file, llava)
    implicit = rules is None
    merged["policy"] = edited(rules, request.edits)
    both = "the command line" if not request.recipe else f"{source} and the command line"
    try:
        recipe = Recipe.parse(merged, both)
    except RecipeError as error:
        raise RecipeError(both, at_flags(error.dotted, request)) from None
    if not recipe.model:
        raise UserError(
            "no model: set --model NAME, or use a --recipe that names one",
            code="recipe-no-model",
            where="--model",
            hint=f"see: {PROG} --list-models",
        )
    if recipe.dtype == "fastest":  # save the dtype itself: the fastest dtype differs by machine
        fastest = str(fastest_dtype(train_device(recipe.train))).removeprefix("torch.")
        recipe = recipe.model_copy(update={"dtype": _dtype_of_resumed(request) or fastest})
    per_device = of_file.train.get("per_device_train_batch_size")
    batch = (int(per_device), int(of_file.train.get("gradient_accumulation_steps", 1))) if per_device else None
    notes = [llava.line] if llava and llava.line else []
    warnings = [*(llava.warnings if llava else []), *base_model.warnings(recipe), *protection.warnings(recipe)]
    return MergedRecipe(recipe, request.recipe or "", implicit, batch, [*notes, *notes_on_data], warnings)


def _dtype_of_resumed(request: Request) -> str | None:
    """Return the dtype of the run that the request resumes; None if it resumes none."""
    run = checkpoints.resumed_run(request.output_dir, request.resume)
    if run is None or not (run / "recipe.yaml").is_file():  # nothing was saved: the run starts again
        return None
    return str(yaml_file.read_file(run / "recipe.yaml")[0].get("dtype", "")) or None


def _without_evaluation(content: dict[str, Any], request: Request) -> list[str]:
    """Drop the held-out records of a recipe if --data_path replaces its data. Return a note about it."""
    data, flags = content["data"], request.overrides.get("data", {})
    held_out = data["eval_path"]
    if (
        held_out is None
        or "eval_path" in flags
        or (resolved_paths(flags.get("path", data["path"])) == resolved_paths(data["path"]))
    ):
        return []
    data["eval_path"] = None
    for name in ("eval_strategy", "load_best_model_at_end"):
        content["train"].pop(name, None)
    return [f"--data_path replaces the data of the recipe, so {held_out} is not used (set --eval_data_path FILE)"]


def _llava(request: Request) -> llava_flags.Meaning | None:
    if not request.llava:
        return None
    flags = dict(request.llava)
    if request.recipe or request.policy:
        clash = [f"--{name}" for name in DECIDES_POLICY if flags.get(name)]
        if clash:
            decided_by = "recipe" if request.recipe else "policy"
            raise UserError(
                f"the {decided_by} already decides what trains",
                code="flag-conflict",
                where=" ".join(clash),
                hint="use --method",
            )
        # --rank and the like change the rules given, not those that LLaVA's flags would mean.
        meaning = llava_flags.meaning(flags, rank=None, alpha=None, dropout=None)
        return llava_flags.Meaning([], meaning.quantization, "", meaning.warnings)
    if request.edits.method in ADAPTERS and (llava_flags.is_script(flags) or flags.get("freeze_backbone")):
        flags["lora_enable"] = True
    edits = request.edits
    return llava_flags.meaning(flags, rank=edits.rank, alpha=edits.alpha, dropout=edits.dropout)


def _policy(request: Request, base: Recipe, meaning: llava_flags.Meaning | None) -> list[dict[str, Any]] | None:
    if request.policy is not None:
        return _policy_flag(request.policy)
    return meaning.rules if meaning and meaning.rules else base.policy


def _policy_flag(text: str) -> list[dict[str, Any]]:
    rules, source = _read_policy(text)
    problems = policy_problems(rules)
    if problems:
        raise RecipeError(source, problems)
    return rules


def _read_policy(text: str) -> tuple[list[dict[str, Any]], str]:
    """Return the unchecked rules of --policy, and the label of their source."""
    is_file = os.path.isfile(text)  # noqa: PTH113 - Path.is_file raises if the text is too long
    source = text if is_file else "--policy"
    try:
        body = Path(text).read_text(encoding="utf-8") if is_file else text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the file: {error}", code="file-unreadable", where=text, hint=yaml_file.TEXT
        ) from None
    if not is_file and text.endswith((".yaml", ".yml")):
        raise UserError(f"no such file: {text}", code="path-missing", where="--policy", hint=beside(Path(text)))
    indented = "\n".join("  " + line for line in body.splitlines())
    rules = yaml_file.read(f"policy:\n{indented}", source, above=1)[0]["policy"]
    if isinstance(rules, Mapping):
        rules = rules.get("policy", [rules])
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        example = "[{modules: language, method: milora, rank: 64, learning_rate: 2.0e-4}]"
        raise UserError("expected a list of rules", code="policy-value", where=source, hint=f"for example {example}")
    return [dict(rule) for rule in rules], source


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merge(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), dict) else value
    return out
