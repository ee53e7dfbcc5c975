"""Merge the settings of a run: an adapter or earlier run, the recipe, LLaVA's flags, flags. Later layers win.

The layers are plain mappings, and the result is validated once. No model, data or device is looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from milora_vl.common.cli.console import beside
from milora_vl.common.errors import Key, Problem, UserError, with_problems
from milora_vl.common.yaml_text import TEXT, YamlTextError, parse_yaml
from milora_vl.core.adapter import checkpoints
from milora_vl.train import arguments, inherit, llava_flags
from milora_vl.train.flags import ADAPTERS, PROG, Request, edited, of_projector
from milora_vl.train.llava_flags import Meaning
from milora_vl.train.recipe import Recipe, checked, flags_of, read_recipe, train_section

DECIDES_POLICY = ("lora_enable", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "freeze_backbone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    request: Request
    recipe: Recipe
    is_set: frozenset[str]  # the top keys that an adapter, the recipe or a flag sets
    source: str = ""  # of the recipe, as errors name it
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def places(self) -> Iterator[None]:
        """Turn the keys in the errors of the block into the places of their values."""
        try:
            yield
        except UserError as error:
            raise with_problems(error, located(error.problems, self.request, self.source, self.recipe)) from error


def located(problems: Sequence[Problem], request: Request, source: str, recipe: Recipe | None = None) -> list[Problem]:
    """Return the problems with the places of their keys: the flag, or the recipe, or without one the flag that would.

    A flag changes several rules, so it may have the same problem several times: one stays.
    """
    rules = (recipe.policy if recipe is not None else None) or []

    def place(key: Key) -> str:
        first, last = key.parts[0], str(key.parts[-1])
        if first == "policy":
            number = key.parts[1] if len(key.parts) > 1 else None
            is_projector = isinstance(number, int) and number < len(rules) and of_projector(rules[number])
            names = ["mm_projector_lr", last] if last == "learning_rate" and is_projector else [last]
            for name in names:
                if getattr(request.edits, name, None) is not None:
                    return f"--{name}"
            if request.policy is not None:
                return f"{key} in {request.policy if _is_file(request.policy) else '--policy'}"
        if first == "quantization" and request.llava.get("bits"):
            return "--bits"
        dotted = str(key)
        if dotted in request.flags:
            return request.flags[dotted]
        if source:
            return f"{dotted} in {source}"
        flag_of = {name: flag.name for name, flag, _ in flags_of()}
        is_argument = dotted.startswith("train.") and last in arguments.known()
        return f"--{last}" if is_argument else f"--{flag_of[dotted]}" if dotted in flag_of else dotted

    placed = [replace(p, where=place(p.where)) if isinstance(p.where, Key) else p for p in problems]
    return list({(p.where, p.message): p for p in reversed(placed)}.values())[::-1]


def merge(request: Request) -> Settings:
    content, source = read_recipe(request.recipe) if request.recipe else ({}, "")
    adapter, after = (str(request.overrides.get(n) or content.get(n) or "") for n in ("adapter", "after"))
    of_adapter: dict[str, Any] = {}
    notes: list[str] = []
    if adapter:
        of_adapter = inherit.settings_of(Path(adapter))
    elif after:
        of_adapter, notes = _of_after(after, request)
    meaning = _meaning(request, adapter or after)
    flags = dict(request.overrides)
    if request.policy is not None:
        flags["policy"] = _read_policy(request.policy)
    sampled = {"fps", "num_frames"} & flags.get("data", {}).keys()
    if len(sampled) == 1:  # the flag replaces either setting of the recipe
        flags["data"] = dict.fromkeys({"fps", "num_frames"} - sampled) | flags["data"]
    problems: list[Problem] = []
    layers = [of_adapter, content, _of_llava(request, meaning, adapter or after), flags]
    for number, layer in enumerate(layers):
        if "train" in layer:
            train, wrong = train_section(layer["train"])
            layers[number] = {**layer, "train": train}
            problems += wrong
    below = _merged(*layers[:2])
    notes += _give_way(below, layers[3])
    merged = _merged(below, *layers[2:])
    if "data" in layers[2] and "image_aspect_ratio" not in flags.get("data", {}):
        notes.append("LLaVA flags: without --image_aspect_ratio images are cropped to a square")
    rules = merged.get("policy")
    if rules is None or (isinstance(rules, list) and all(isinstance(rule, Mapping) for rule in rules)):
        is_set, merged["policy"] = frozenset(merged), edited(rules, request.edits)
    recipe, wrong = checked(merged)
    problems += wrong
    if adapter and not problems:
        problems += inherit.contradictions(adapter, of_adapter, recipe)
    if not merged.get("model"):
        hint = f"see: {PROG} --list-recipes"
        message = "no model: set --model NAME, or use a --recipe that names one"
        problems.append(Problem(message, "recipe-no-model", "--model", hint))
    if problems:
        raise UserError(problems=located(problems, request, source, recipe))
    line = [meaning.line] if meaning.line else []
    return Settings(request=request, recipe=recipe, is_set=is_set, source=source, notes=[*line, *notes])


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all layers; mappings are merged key by key, and of any other value the last one stays."""
    content: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            below = content.get(name)
            is_merged = isinstance(value, Mapping) and isinstance(below, Mapping)
            content[name] = _merged(dict(below or {}), value) if is_merged else value
    return content


def _of_after(after: str, request: Request) -> tuple[dict[str, Any], list[str]]:
    run = checkpoints.resumed_run(request.output_dir, request.resume)
    if run is not None and checkpoints.latest(run)[0] is not None:
        return inherit.settings_resumed(run), []
    return inherit.settings_after(Path(after))


def _of_llava(request: Request, meaning: Meaning, adapter: str) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    flags = request.llava
    if meaning.rules:
        layer["policy"] = meaning.rules
    if meaning.quantization:
        layer["quantization"] = meaning.quantization
    if flags.get("group_by_modality_length"):
        layer["train"] = {"train_sampling_strategy": "group_by_length"}
    if parts := llava_flags.parts(flags):
        layer["parts"] = parts
    if llava_flags.is_script(flags) and not request.recipe and not adapter:
        layer["data"] = {"image_aspect_ratio": "plain"}
    return layer


def _give_way(below: dict[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """Drop the held-out records of a recipe whose data the flags replace. Returns a note about them."""
    data, over = below.get("data"), flags.get("data", {})
    if not isinstance(data, dict) or not data.get("eval_path") or "eval_path" in over:
        return []
    if over.get("path", data.get("path")) == data.get("path"):
        return []
    for name in ("eval_strategy", "load_best_model_at_end"):
        below.get("train", {}).pop(name, None)
    note = f"--data_path replaces the data of the recipe, so {data.pop('eval_path')} is not used"
    return [f"{note} (set --eval_data_path FILE)"]


def _meaning(request: Request, adapter: str) -> Meaning:
    flags, edits = dict(request.llava), request.edits
    if not flags:
        return Meaning([])
    if request.recipe or request.policy or adapter:
        clash = [f"--{name}" for name in DECIDES_POLICY if flags.get(name) and not (adapter and name == "lora_enable")]
        if clash:
            decided_by = "adapter" if adapter else "recipe" if request.recipe else "policy"
            hint = "remove the flags" if adapter else "use --method"
            message = f"the {decided_by} already decides what trains"
            raise UserError(message, code="flag-conflict", where=" ".join(clash), hint=hint)
        # --rank and the like change the rules given, not those that LLaVA's flags would mean.
        meaning = llava_flags.meaning(flags, rank=None, alpha=None, dropout=None)
        return Meaning([], meaning.quantization)
    if edits.method in ADAPTERS and (llava_flags.is_script(flags) or flags.get("freeze_backbone")):
        flags["lora_enable"] = True
    return llava_flags.meaning(flags, rank=edits.rank, alpha=edits.alpha, dropout=edits.dropout)


def _is_file(text: str) -> bool:
    return os.path.isfile(text)  # noqa: PTH113 - Path.is_file raises if the text is too long


def _read_policy(text: str) -> list[Any]:
    is_file = _is_file(text)
    source = text if is_file else "--policy"
    if not is_file and text.endswith((".yaml", ".yml")):
        raise UserError(f"no such file: {text}", code="path-missing", where="--policy", hint=beside(Path(text)))
    try:
        rules = parse_yaml(Path(text).read_text(encoding="utf-8") if is_file else text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file: {error}", code="file-unreadable", where=text, hint=TEXT) from None
    except YamlTextError as error:
        raise UserError(f"not valid YAML: {error}", code="yaml-syntax", where=source) from None
    if isinstance(rules, Mapping):
        rules = rules.get("policy", [rules])
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        example = "[{modules: language, method: milora, rank: 64, learning_rate: 2.0e-4}]"
        raise UserError("expected a list of rules", code="policy-value", where=source, hint=f"for example {example}")
    return rules
