"""Merge recipe file, flags and LLaVA's flags into one recipe. It looks at no model, no data and no device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from milora_vl.common.cli.command_line import beside
from milora_vl.common.errors import Key, Problem, UserError, collected
from milora_vl.common.yaml_text import TEXT, read_mapping
from milora_vl.core.policy.default import RuleDict
from milora_vl.train.recipe import continued, llava_flags
from milora_vl.train.recipe.command_line import PROG, Request
from milora_vl.train.recipe.hf_flags import overridden, value_of
from milora_vl.train.recipe.llava_flags import Meaning
from milora_vl.train.recipe.policy_edits import ADAPTERS, edited
from milora_vl.train.recipe.recipe_file import RecipeFile
from milora_vl.train.recipe.schema import Recipe, conflicts, policy_problems, values_of

Default = Literal["policy", "rank", "template"]
DECIDES_POLICY = ("lora_enable", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_backbone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The recipe with every flag applied, and the problems of its values: all that can be known without the model.

    `rules` are the recipe's rules after the flags: rules with problems may have others on the model, too.
    """

    recipe: Recipe | None  # None if some value is wrong
    problems: list[Problem]
    source: str  # name or file of the recipe, or "the command line", for lists of problems
    model: str | None  # what the run names, even if other values are wrong
    model_at: str  # where it does: the flag, or the line of the recipe
    rules: list[RuleDict] | None  # None if there is no list of rules to check
    names_tower: bool  # whether the recipe or a flag names a vision tower, to compose the base
    defaults: frozenset[Default]  # ours: the recipe and the flags do not set them
    batch_in_recipe: tuple[int, int] | None = None  # what the recipe itself says: per device, accumulation
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def merge_recipe(request: Request) -> Merged:
    """Merge recipe, flags and LLaVA's flags. Raises UserError only for files that cannot be read."""
    problems = list(request.problems)
    file, of_adapter = request.recipe_file, dict[str, Any]()
    adapter = str(request.overrides.get("adapter") or file.content.get("adapter") or "")
    if adapter:
        with collected(problems):
            of_adapter = continued.settings_of(Path(adapter))
    file = replace(file, content=_merge(of_adapter, file.content))
    of_file, in_file = values_of(file.content)
    of_flags, in_flags = values_of(request.overrides)
    problems += [*file.located(in_file), *in_flags]
    meaning, rules = Meaning([]), file.content.get("policy")
    with collected(problems):
        meaning = _llava(request, adapter)
        rules = meaning.rules or rules
    with collected(problems):
        rules = rules if request.policy is None else _read_policy(request.policy)
    after_flags: list[RuleDict] | None = None
    is_known = bool(of_adapter) or not adapter  # what an adapter with a problem names is not
    is_list = isinstance(rules, list) and all(isinstance(rule, Mapping) for rule in rules)
    if is_known and (rules is None or is_list):
        wrong = policy_problems(rules)
        problems += file_of_rules(request).located(wrong)
        with collected(problems):
            after_flags = edited(rules, request.edits)
            problems += [problem for problem in policy_problems(after_flags) if problem not in wrong]
    recipe, notes = None, [meaning.line] if meaning.line else []
    if of_file is not None and of_flags is not None and after_flags is not None and not problems:
        content, more = _merged_content(of_file, request, meaning)
        recipe, problems = values_of({**content, "policy": after_flags})
        if recipe is not None:
            problems += conflicts(recipe)
            problems += continued.contradictions(adapter, of_adapter, recipe) if of_adapter else []
        notes += more
    model = request.overrides.get("model") or file.content.get("model")
    if not model and is_known:
        problems.append(
            Problem(
                "no model: set --model NAME, or use a --recipe that names one",
                "recipe-no-model",
                "--model",
                f"see: {PROG} --list-recipes",
            )
        )
    defaults = set[Default]()
    if rules is None:
        defaults |= {"policy"} if request.edits.rank is not None else {"policy", "rank"}
    if "template" not in file.content and not request.sets("template"):
        defaults.add("template")
    return Merged(
        recipe=recipe,
        problems=problems,
        source=file.source if request.recipe else file_of_rules(request).source,
        model=str(model) if model else None,
        model_at="--model" if "model" in request.overrides else file.place_of(Key.of("model")),
        rules=after_flags,
        names_tower=bool(request.llava.get("vision_tower") or (of_file is not None and of_file.parts.vision_tower)),
        defaults=frozenset(defaults),
        batch_in_recipe=_batch(of_file),
        notes=notes,
        warnings=meaning.warnings,
    )


def _merged_content(of_file: Recipe, request: Request, meaning: Meaning) -> tuple[dict[str, Any], list[str]]:
    """Return the content of the merged recipe, and notes on what the flags change beside their own keys."""
    content = of_file.model_dump() | {"train": overridden(of_file.train, request.overrides.get("train", {}))}
    notes = _without_evaluation(content, request)
    merged = _merge(content, request.overrides)
    sampled = {"fps", "num_frames"} & request.overrides.get("data", {}).keys()
    if len(sampled) == 1:  # the flag replaces either setting of the recipe
        merged["data"][({"fps", "num_frames"} - sampled).pop()] = None
    if meaning.quantization:
        merged["quantization"] = meaning.quantization
    if request.llava.get("group_by_modality_length"):
        merged["train"].setdefault("train_sampling_strategy", "group_by_length")
    merged["parts"] = {**merged["parts"], **llava_flags.parts(request.llava)}
    has_ratio = request.recipe or merged["adapter"] or request.sets("data.image_aspect_ratio")
    if llava_flags.is_script(request.llava) and not has_ratio:
        merged["data"]["image_aspect_ratio"] = "plain"
        notes.append("LLaVA flags: without --image_aspect_ratio images are cropped to a square")
    return merged, notes


def _batch(of_file: Recipe | None) -> tuple[int, int] | None:
    per_device = None if of_file is None else of_file.train.get("per_device_train_batch_size")
    if of_file is None or not per_device:
        return None
    return int(per_device), int(value_of(of_file.train, "gradient_accumulation_steps"))


def _without_evaluation(content: dict[str, Any], request: Request) -> list[str]:
    """Drop the held-out records of a recipe if --data_path replaces its data. Return a note about it."""
    data, flags = content["data"], request.overrides.get("data", {})
    held_out = data["eval_path"]
    if held_out is None or "eval_path" in flags or flags.get("path", data["path"]) == data["path"]:
        return []
    data["eval_path"] = None
    for name in ("eval_strategy", "load_best_model_at_end"):
        content["train"].pop(name, None)
    return [f"--data_path replaces the data of the recipe, so {held_out} is not used (set --eval_data_path FILE)"]


def _llava(request: Request, adapter: str) -> Meaning:
    flags = dict(request.llava)
    if not flags:
        return Meaning([])
    if request.recipe or request.policy or adapter:
        clash = [f"--{name}" for name in DECIDES_POLICY if flags.get(name) and not (adapter and name == "lora_enable")]
        if clash:
            decided_by = "adapter" if adapter else "recipe" if request.recipe else "policy"
            raise UserError(
                f"the {decided_by} already decides what trains",
                code="flag-conflict",
                where=" ".join(clash),
                hint="remove the flags" if adapter else "use --method",
            )
        # --rank and the like change the rules given, not those that LLaVA's flags would mean.
        meaning = llava_flags.meaning(flags, rank=None, alpha=None, dropout=None)
        return Meaning([], meaning.quantization, "", meaning.warnings)
    if request.edits.method in ADAPTERS and (llava_flags.is_script(flags) or flags.get("freeze_backbone")):
        flags["lora_enable"] = True
    edits = request.edits
    return llava_flags.meaning(flags, rank=edits.rank, alpha=edits.alpha, dropout=edits.dropout)


def file_of_rules(request: Request) -> RecipeFile:
    """Return where the rules stand: in the file of --policy or of the recipe; without lines if flags drop rules."""
    if request.policy is not None:
        return RecipeFile(source=request.policy if _is_file(request.policy) else "--policy")
    file = request.recipe_file
    if request.edits.method in ("full", "projector"):
        return replace(file, lines={key: line for key, line in file.lines.items() if not key.startswith("policy[")})
    return file


def _is_file(text: str) -> bool:
    return os.path.isfile(text)  # noqa: PTH113 - Path.is_file raises if the text is too long


def _read_policy(text: str) -> list[RuleDict]:
    """Return the unchecked rules of --policy."""
    is_file = _is_file(text)
    source = text if is_file else "--policy"
    try:
        body = Path(text).read_text(encoding="utf-8") if is_file else text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file: {error}", code="file-unreadable", where=text, hint=TEXT) from None
    if not is_file and text.endswith((".yaml", ".yml")):
        raise UserError(f"no such file: {text}", code="path-missing", where="--policy", hint=beside(Path(text)))
    indented = "\n".join("  " + line for line in body.splitlines())
    rules = read_mapping(f"policy:\n{indented}", source, above=1)[0]["policy"]
    if isinstance(rules, Mapping):
        rules = rules.get("policy", [rules])
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        example = "[{modules: language, method: milora, rank: 64, learning_rate: 2.0e-4}]"
        raise UserError("expected a list of rules", code="policy-value", where=source, hint=f"for example {example}")
    return [dict(rule) for rule in rules]


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = _merge(out[key], value) if isinstance(value, Mapping) and isinstance(out.get(key), dict) else value
    return out
