"""Merge recipe file, flags and LLaVA's flags into one recipe; the place (flag or line) of each problem in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import llava_recipes
from milora_data.command.cli import beside, suggest
from milora_data.errors import Problem, UserError, at_flag, with_problems
from milora_data.templates import OWN
from milora_vl import checkpoints
from milora_vl.models import loading
from milora_vl.models.devices import fastest_dtype, train_device
from milora_vl.models.names import UnknownModelError
from milora_vl.recipe import base_model, hf_arguments, llava_flags, protection, yaml_file
from milora_vl.recipe.arguments import PROG, RECIPE_FLAGS, Request
from milora_vl.recipe.changes import resolved_paths
from milora_vl.recipe.hf_arguments import RENAMED, overridden
from milora_vl.recipe.on_model import of_default_rank, problems_on, require_float_weights, require_pictures
from milora_vl.recipe.policy_edits import ADAPTERS, edited
from milora_vl.recipe.schema import Recipe, RecipeError, is_key, located, policy_problems

ResultT = TypeVar("ResultT")
DECIDES_POLICY = ("lora_enable", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_backbone")


@dataclass(frozen=True, slots=True)
class Settings:
    """The resolved recipe, with notes and warnings for the user."""

    recipe: Recipe
    source: str  # name or file of the recipe, or "" without one
    implicit_policy: bool  # default rules: their projector rule is dropped for a model without projector
    batch_in_recipe: tuple[int, int] | None = None  # per device, accumulation
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def resolve(request: Request) -> Settings:
    """Merge recipe, flags and LLaVA's flags. Raises UserError with all problems in them."""
    try:
        chosen = _resolve(request)
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
    return chosen


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
    protection.check(recipe)
    require_pictures(recipe, config)
    if recipe.quantization != "none":
        require_float_weights(recipe, config)


def _config_named(request: Request) -> Any:
    """Return the config of the requested model even if the recipe has problems; None if it is not available."""
    model = request.overrides.get("model") or read_recipe(request.recipe)[0].get("model")
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


def at_their_places(action: Callable[[Request], ResultT]) -> Callable[[Request], ResultT]:
    """Return the action with errors that name the place where the user sets a key, instead of the key alone.

    The place is the flag of the command line that has set the key, else the line of the recipe. Code that checks a
    recipe knows only the keys; every step of a run can find a mistake in them, so the whole action is covered.
    """

    @wraps(action)
    def placed(request: Request) -> ResultT:
        try:
            return action(request)
        except UserError as error:
            try:
                problems = _at_places(error.problems, request)
            except UserError:  # the recipe has changed since it was read: its lines do not matter then
                raise error from None
            raise with_problems(error, problems) from error

    return placed


def _at_places(problems: Sequence[Problem], request: Request) -> list[Problem]:
    """Return the problems; the place of each that has a key of the recipe is a flag, or a line of the recipe."""
    flags = {f"train.{name}": f"--{name}" for name in hf_arguments.flags()}
    flags |= {path: f"--{name}" for name, (path, *_) in RECIPE_FLAGS.items()}
    keys = {flag: key for key, flag in flags.items()}
    _, lines, source = read_recipe(request.recipe)
    lines = {_canonical(key): line for key, line in lines.items()} | lines
    moved = []
    for problem in at_flags(problems, request):
        key = problem.where if is_key(problem.where) else keys.get(problem.where, "")
        is_typed = problem.where.startswith("--") and _sets(request, key)
        if key in lines and not is_typed:
            moved += located([replace(problem, where=key)], source, lines)
        elif is_key(problem.where) and request.recipe is None:
            moved.append(replace(problem, where=flags.get(key, key)))
        else:
            moved += located([problem], source, lines) if is_key(problem.where) else [problem]
    return moved


def _canonical(key: str) -> str:
    section, _, name = key.partition(".")
    return f"train.{RENAMED.get(name, name)}" if section == "train" else key


def at_flags(problems: Sequence[Problem], request: Request) -> list[Problem]:
    """Return the problems with the flag of the command line as the place of each value that a flag has set.

    A flag changes several rules, so it may have the same problem several times: one stays. An alpha that follows from
    --rank has no problem of its own.
    """
    typed = request.overrides.get("train", {})
    flags = {_canonical(f"train.{name}"): name for name in typed} | {f"train.{name}": name for name in typed}
    flags |= {path: name for name, (path, *_) in RECIPE_FLAGS.items() if _sets(request, path)}
    flags |= {f"parts.{key}": name for name, key in llava_flags.PARTS.items() if name in request.llava}
    if request.llava.get("bits") is not None:
        flags["quantization"] = "bits"
    if request.policy is not None:
        flags["policy"] = "policy"
    of_rules = _rule_flags(request)
    places = {problem.where for problem in problems}
    moved = []
    for problem in problems:
        rule, _, key = problem.where.partition(".")
        is_rule = rule.startswith("policy[")
        if is_rule and key == "alpha" and "alpha" not in of_rules and "rank" in of_rules and f"{rule}.rank" in places:
            continue
        flag = of_rules.get(key) if is_rule else flags.get(problem.where)
        moved.append(problem if flag is None else replace(problem, where=f"--{flag}"))
    return list(dict.fromkeys(moved))


def _rule_flags(request: Request) -> dict[str, str]:
    """Return the flag that has set each key of the rules; a key that two flags set in different rules is left out."""
    edits = asdict(request.edits)
    flags = {name: name for name in ("method", "rank", "alpha", "dropout", "learning_rate") if edits[name] is not None}
    if edits["projector_learning_rate"] is None:
        return flags
    if "learning_rate" in flags:
        del flags["learning_rate"]
        return flags
    return flags | {"learning_rate": "mm_projector_lr"}


def _rules_of(request: Request) -> tuple[Any, str, dict[str, int]]:
    """Return the unchecked rules before the flags change them (None: default rules), their source and its lines."""
    if request.policy is not None:
        return *_read_policy(request.policy), {}
    content, lines, source = read_recipe(request.recipe)
    meaning = _llava(request)
    if meaning and meaning.rules:
        return meaning.rules, "the command line", {}
    return content.get("policy"), source, lines


def _problems_of_flags(request: Request) -> Sequence[Problem]:
    """Return problems of the flags alone; problems of the recipe stop `_resolve` before it checks the flags."""
    try:
        Recipe.parse(request.overrides, "the command line")
    except RecipeError as error:
        return error.dotted
    return []


def _resolve(request: Request) -> Settings:
    from_file, lines, source = read_recipe(request.recipe)
    base = Recipe.parse(from_file, source, lines)
    meaning = _llava(request)
    content = base.model_dump() | {"train": overridden(base.train, request.overrides.get("train", {}))}
    notes_on_data = _without_evaluation(content, request)
    merged = _merge(content, request.overrides)
    if meaning and meaning.quantization:
        merged["quantization"] = meaning.quantization
    if request.llava and request.llava.get("group_by_modality_length"):
        merged["train"].setdefault("train_sampling_strategy", "group_by_length")
    merged["parts"] = {**merged["parts"], **llava_flags.parts(request.llava)}
    if llava_flags.is_script(request.llava) and not request.recipe and not _sets(request, "data.image_aspect_ratio"):
        merged["data"]["image_aspect_ratio"] = "plain"
        notes_on_data += ["LLaVA flags: without --image_aspect_ratio images are cropped to a square"]
    if "template" not in from_file and not _sets(request, "template") and merged["model"]:
        # A model whose processor prepares the pictures has its own prompt format, and no other.
        merged["template"] = OWN if base_model.prepares_with_processor(merged["model"]) else merged["template"]
    rules = _policy(request, base, meaning)
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
    per_device = base.train.get("per_device_train_batch_size")
    batch = (int(per_device), int(base.train.get("gradient_accumulation_steps", 1))) if per_device else None
    notes = [meaning.line] if meaning and meaning.line else []
    warnings = [*(meaning.warnings if meaning else []), *base_model.warnings(recipe), *protection.warnings(recipe)]
    return Settings(recipe, request.recipe or "", implicit, batch, [*notes, *notes_on_data], warnings)


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


def _sets(request: Request, path: str) -> bool:
    *section, name = path.split(".")
    return name in (request.overrides.get(section[0], {}) if section else request.overrides)


def read_recipe(name: str | None, flag: str = "--recipe") -> tuple[dict[str, Any], dict[str, int], str]:
    """Return content, lines and label of a recipe by name or path; empty without a name. `flag` has the name."""
    if name is None:
        return {}, {}, "the command line"
    if name in llava_recipes.names():
        label = f"recipe {name}"
        return (*yaml_file.read(llava_recipes.read(name), label), label)
    path = Path(name) / "recipe.yaml" if Path(name).is_dir() else Path(name)
    if path.is_file():
        return (*yaml_file.read_file(path), str(path))
    near = suggest(name, llava_recipes.names())
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes: {', '.join(llava_recipes.names())}"
    found = "no packaged recipe and no file has this name"
    if Path(name).is_dir():
        found = "this is a folder without a recipe.yaml"
    raise UserError(
        f"unknown recipe {name!r}: {found}",
        code="recipe-unknown",
        where=flag,
        hint=f"{hint}\nsee: {PROG} --list-recipes",
    )


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
