"""What the user asked for: an adapter or earlier run, the recipe, LLaVA's flags and flags, joined and validated once.

Later layers win. The layers are plain mappings. Only this file and `default_policy.py` edit the rules of a policy. No
model, data or device is looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from milora_vl.common.cli.console import command_line
from milora_vl.common.errors import Key, Problem, UserError, beside, with_problems
from milora_vl.common.yaml_text import TEXT, YamlTextError, parse_yaml
from milora_vl.core.adapter import folders
from milora_vl.core.adapter.folders import (
    base_of,
    from_there,
    has_config,
    holds_llava_adapter,
    holds_projector_alone,
    recipe_of_run,
    require_adapter,
)
from milora_vl.core.adapter.sidecar import FILE_NAME, read_sidecar, require_trainable
from milora_vl.core.policy import Rule, Target
from milora_vl.core.policy.rules import DEFAULT_RULES, RuleDict
from milora_vl.core.policy.rules import METHODS as RULE_METHODS
from milora_vl.train.settings import (
    ADAPTERS,
    PROG,
    PolicyEdits,
    Recipe,
    Request,
    checked,
    differences,
    flags_of,
    known_arguments,
    read_recipe,
    train_section,
)

ADAPTER_FIELDS = ("rank", "alpha", "rslora", "dropout", "seed", "protect")


def edited(rules: Sequence[RuleDict] | None, edits: PolicyEdits) -> list[RuleDict]:
    """Return the rules after the flags; `full` and `frozen` rules keep their fields.

    A method drops `protect` of the rules, and milora has the scale 1, so that a method is its authors'.

    Raises UserError for a flag without effect.

    >>> edited(None, PolicyEdits(method="lora", rank=8))[0]["alpha"]  # the scale alpha/rank stays 1
    8.0
    """
    original = DEFAULT_RULES if rules is None else rules
    if edits.train is not None:
        original = [rule for rule in original if str(rule.get("modules", "")).startswith(edits.train)]
        if not original:
            message, hint = f"no rule of the policy trains the {edits.train}", "name it in a rule of --policy"
            raise UserError(message, code="flag-no-effect", where="--train", hint=hint)
    out = [dict(rule) for rule in original]
    adapters = [is_adapter(rule) for rule in out]
    _refuse_useless(any(adapters), edits)
    for rule, adapts in zip(out, adapters, strict=True):
        if adapts:
            _edit_adapter(rule, edits)
    if edits.method == "full":
        if rules is None and edits.learning_rate is None:  # the default rules have the rate of adapters
            out = [{key: value for key, value in rule.items() if key != "learning_rate"} for rule in out]
        out = [_without_adapter(rule) if adapts else rule for rule, adapts in zip(out, adapters, strict=True)]
    # Drop a rule that only refined the old method. A rule that was empty before stays: its error is reported later.
    out = [rule for rule, before in zip(out, original, strict=True) if len(rule) > 1 or rule == before]
    if edits.mm_projector_lr is not None:
        chosen = [rule for rule in out if of_projector(rule)]
        if not chosen:
            hint = "remove the flag, or add a rule for modules: projector"
            message = "no rule of the policy trains the projector"
            raise UserError(message, code="flag-no-effect", where="--mm_projector_lr", hint=hint)
        for rule in chosen:
            rule["learning_rate"] = edits.mm_projector_lr
    return out


def is_adapter(rule: RuleDict) -> bool:
    return rule.get("method") in ADAPTERS or ("method" not in rule and any(f in rule for f in ADAPTER_FIELDS))


def of_projector(rule: RuleDict) -> bool:
    return str(rule.get("modules", "")).startswith("projector")


def _refuse_useless(has_adapters: bool, edits: PolicyEdits) -> None:
    flags = [f"--{name}" for name in ("protect", "rank", "alpha", "dropout") if asdict(edits)[name] is not None]
    if edits.method == "full":
        if flags:
            message = "no effect with --method full, which makes no adapter"
            hint = "leave these flags out, or use a method with adapters, such as milora"
            raise UserError(message, code="flag-no-effect", where=" ".join(flags), hint=hint)
    elif not has_adapters and (flags or edits.method):
        where = "--method" if edits.method else flags[0]
        hint = "add --lora_enable True to LLaVA's flags, or a rule with --policy"
        raise UserError("no rule makes an adapter", code="policy-no-adapter-rule", where=where, hint=hint)


def _edit_adapter(rule: RuleDict, edits: PolicyEdits) -> None:
    if edits.method in ADAPTERS:
        if "method" in rule:
            rule["method"] = edits.method
        for name in {"protect"} | ({"seed"} - RULE_METHODS[edits.method].fields):
            rule.pop(name, None)
        if edits.method == "milora":  # the paper's scale is 1
            rule.pop("rslora", None)
            if rule.pop("alpha", None) is not None and "rank" in rule:
                rule["alpha"] = rule["rank"]
    is_exception = "method" not in rule and rule.get("protect") == 0  # such as {modules: language.mlp, protect: 0}
    if edits.protect is not None and not is_exception:
        rule.pop("protect", None)
        if "method" in rule and (edits.protect or RULE_METHODS[rule["method"]].protect):
            rule["protect"] = edits.protect
    if edits.rank is not None:
        old, alpha = rule.get("rank"), rule.get("alpha")
        rule["rank"] = edits.rank
        if isinstance(alpha, int | float) and isinstance(old, int) and old > 0 and edits.rank > 0:
            rule["alpha"] = alpha * edits.rank / old
    for name in ("alpha", "dropout", "learning_rate"):
        value = asdict(edits)[name]
        if value is not None and (name in rule or "method" in rule):
            rule[name] = value


def _without_adapter(rule: RuleDict) -> RuleDict:
    kept = {name: value for name, value in rule.items() if name not in ADAPTER_FIELDS}
    return kept | {"method": "full"} if "method" in kept else kept


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
        is_argument = dotted.startswith("train.") and last in known_arguments()
        return f"--{last}" if is_argument else f"--{flag_of[dotted]}" if dotted in flag_of else dotted

    placed = [replace(p, where=place(p.where)) if isinstance(p.where, Key) else p for p in problems]
    return list({(p.where, p.message): p for p in reversed(placed)}.values())[::-1]


def join_settings(request: Request) -> Settings:
    content, source = read_recipe(request.recipe) if request.recipe else ({}, "")
    adapter, after = (str(request.overrides.get(n) or content.get(n) or "") for n in ("adapter", "after"))
    of_adapter: dict[str, Any] = {}
    notes: list[str] = []
    if adapter:
        of_adapter = settings_of_adapter(Path(adapter))
    elif after:
        run = folders.resumed_run(request.output_dir, request.resume)
        if run is not None and folders.latest(run)[0] is not None:
            of_adapter = _taken(recipe_of_run(run))
        else:
            of_adapter, notes = settings_after(Path(after))
    llava, lines = of_llava(request, adapter or after)
    flags = dict(request.overrides)
    if request.policy is not None:
        flags["policy"] = _read_policy(request.policy)
    sampled = {"fps", "num_frames"} & flags.get("data", {}).keys()
    if len(sampled) == 1:  # the flag replaces either setting of the recipe
        flags["data"] = dict.fromkeys({"fps", "num_frames"} - sampled) | flags["data"]
    problems: list[Problem] = []
    layers = [of_adapter, content, llava, flags]
    for number, layer in enumerate(layers):
        if "train" in layer:
            train, wrong = train_section(layer["train"])
            layers[number] = {**layer, "train": train}
            problems += wrong
    below = _joined(*layers[:2])
    notes += _give_way(below, layers[3])
    merged = _joined(below, *layers[2:])
    if "data" in layers[2] and "image_aspect_ratio" not in flags.get("data", {}):
        notes.append("LLaVA flags: without --image_aspect_ratio images are cropped to a square")
    rules = merged.get("policy")
    if rules is None or (isinstance(rules, list) and all(isinstance(rule, Mapping) for rule in rules)):
        is_set, merged["policy"] = frozenset(merged), edited(rules, request.edits)
    recipe, wrong = checked(merged)
    problems += wrong
    if adapter and not problems:
        problems += contradictions(adapter, of_adapter, recipe)
    if not merged.get("model"):
        hint = f"see: {PROG} --list-recipes"
        message = "no model: set --model NAME, or use a --recipe that names one"
        problems.append(Problem(message, "recipe-no-model", "--model", hint))
    if problems:
        raise UserError(problems=located(problems, request, source, recipe))
    return Settings(request=request, recipe=recipe, is_set=is_set, source=source, notes=[*lines, *notes])


def _joined(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all layers; mappings are merged key by key, and of any other value the last one stays."""
    content: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            below = content.get(name)
            is_merged = isinstance(value, Mapping) and isinstance(below, Mapping)
            content[name] = _joined(dict(below or {}), value) if is_merged else value
    return content


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


# The keys of a recipe that describe a model and its inputs. The keys of FIXED are parts of the adapter itself.
FIXED = ("template", "calibration")
TAKEN = (
    "model", "parts", "projector_weights", "quantization", "dtype", "attn_implementation", "policy", *FIXED,
)  # fmt: skip
OF_SECTIONS = {
    "data": (
        "max_length", "image_aspect_ratio", "min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels", "fps",
        "num_frames",
    ),
    "train": ("bf16", "fp16"),
}  # fmt: skip
RATES = ("learning_rate", "weight_decay")


def settings_of_adapter(folder: Path, flag: str = "--adapter") -> dict[str, Any]:
    """Return the settings of the adapter in `folder`, as a recipe: of its run, or what its own files say."""
    if flag == "--after" and (folder / "config.json").is_file() and not has_config(folder):
        message, hint = f"{folder} holds a whole model, without an adapter", f"train on it as a base:  --model {folder}"
        raise UserError(message, code="adapter-missing", where=flag, hint=hint)
    require_adapter(folder, flag, "milora_vl.train", flag)
    if holds_projector_alone(folder):
        message, hint = f"{folder} holds a projector alone", f"use  --projector_weights {folder}"
        raise UserError(message, code="adapter-missing", where=flag, hint=hint)
    is_other = holds_llava_adapter(folder)
    sidecar = None if is_other else read_sidecar(folder)
    if sidecar is None:
        why = "is in the layout of another program" if is_other else f"has no {FILE_NAME}, which lists what trains"
        raise UserError(f"{folder} {why}", where=flag, hint=to_merge(folder))
    require_trainable(folder, sidecar, is_trainable=flag == "--adapter")
    run = recipe_of_run(folder)
    if not run.get("policy"):  # saved in Python
        rules = [_rule_of(target) for target in sidecar.targets]
        return {"model": base_of(folder), "policy": rules}
    run["model"] = from_there(folder, str(run.get("model") or base_of(folder)))
    return _taken(run)


def _taken(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe says about its model and its inputs."""
    sections = {
        section: {name: value for name, value in run.get(section, {}).items() if name in names}
        for section, names in OF_SECTIONS.items()
    }
    return {name: value for name, value in run.items() if name in TAKEN} | sections


def settings_after(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that a run takes from the run in `folder`, whose update it keeps, and notes.

    A module that trained in full gets an adapter like the others. Rules without protection get the default method.
    Raises UserError as `settings_of`.
    """
    settings = settings_of_adapter(folder, "--after")
    rules = [Rule.model_validate(rule) for rule in settings["policy"]]
    adapter = next(rule for rule in rules if rule.method not in (None, "full", "frozen"))
    settings["policy"] = [
        {**(adapter if rule.method == "full" else rule).model_dump(exclude_none=True), "modules": rule.modules}
        for rule in rules
    ]
    if any(rule.in_force().get("protect") for rule in rules):
        return settings, []
    settings["policy"] = edited(settings["policy"], PolicyEdits(method="milora"))
    note = (
        f"note: {folder} was trained without protection, so it has moved what the base knew already; without other "
        "rules this run trains with method milora and protects what is left"
    )
    return settings, [note]


def _rule_of(target: Target) -> dict[str, Any]:
    """Return a rule for the module of a target.

    >>> _rule_of(Target(path="lm.q", shape=(4, 4), tower="language", method="lora", rank=2, alpha=2.0))
    {'modules': 'lm.q', 'method': 'lora', 'rank': 2, 'alpha': 2.0}
    """
    share = RULE_METHODS[target.method].protect
    defaults = Target(path="", shape=(), tower=None, method=target.method, protect=share).to_dict()
    fields = {name: value for name, value in target.to_dict().items() if value != defaults[name]}
    rule = {name: value for name, value in fields.items() if name not in ("path", "shape", "tower")}
    return {"modules": target.path, "method": target.method, **rule}


def contradictions(adapter: str, settings: Mapping[str, Any], recipe: Recipe) -> list[Problem]:
    """Return the problem of a recipe that contradicts the adapter's `settings`; other rates do not."""
    found: dict[tuple[str | int, ...], str] = {}
    for key, (has, got) in differences(Recipe.parse(settings), recipe).items():
        parts = tuple(int(part) if part.isdigit() else part for part in re.findall(r"\w+", key))
        if parts[0] in ("policy", *FIXED) and parts[0] in settings and parts[-1] not in RATES:
            found[parts] = f"  {key}: it has {has}, got {got}"
    if not found:
        return []
    lines, hint = "\n".join(found.values()), "remove the setting, or train on the merged model:"
    message = f"contradicts the adapter {adapter}:\n{lines}"
    where = Key(next(iter(found)))
    return [Problem(message, "adapter-other-settings", where, f"{hint}\n{to_merge(Path(adapter))}")]


def to_merge(adapter: Path) -> str:
    command = command_line("milora_vl.export", adapter, "--to", "merged", "--output_dir", "MERGED")
    return f"{command}\nthen  --model MERGED"


# The values that are accepted, and why no other is.
LLAVA_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "mm_use_im_start_end": ((False,), "LLaVA-1.5 has no start and end tokens around images"),
    "mm_use_im_patch_token": ((False,), "LLaVA-1.5 has no patch token"),
    "mm_projector_type": (("mlp2x_gelu",), "Hugging Face's LLaVA has a projector of two layers"),
    "bits": ((16, 8, 4), "as in LLaVA"),
}
LLAVA_PARTS = {"vision_tower": "vision_tower", "mm_vision_select_layer": "select_layer"}


def of_llava(request: Request, adapter: str) -> tuple[dict[str, Any], list[str]]:
    """Return what LLaVA's flags mean, as a layer of a recipe, and a line about the rules that they choose.

    With flags of a script, LLaVA's defaults apply to the others. Rules come from them alone, unless `adapter`, the
    recipe or a policy already decides what trains.
    """
    flags, layer = request.llava, dict[str, Any]()
    for name, value in flags.items():
        accepted, why = LLAVA_ONLY.get(name, ((value,), ""))
        if value not in accepted:
            message = f"got {value}; only {', '.join(map(str, accepted))} is supported: {why}"
            raise UserError(message, code="flag-unsupported", where=f"--{name}")
    if flags.get("bits", 16) != 16:
        layer["quantization"] = f"{flags['bits']}bit"
    if flags.get("group_by_modality_length"):
        layer["train"] = {"train_sampling_strategy": "group_by_length"}
    if parts := {field: flags[flag] for flag, field in LLAVA_PARTS.items() if flags.get(flag) is not None}:
        layer["parts"] = parts
    decides = [f"--{name}" for name in ("lora_enable", "tune_mm_mlp_adapter") if flags.get(name)]
    if not decides and flags.get("lora_enable") is None and flags.get("vision_tower") is None:
        return layer, []
    if not request.recipe and not adapter:
        layer["data"] = {"image_aspect_ratio": "plain"}
    if decided_by := "adapter" if adapter else "recipe" if request.recipe else "policy" if request.policy else "":
        if decides and not (adapter and decides == ["--lora_enable"]):
            hint = "remove the flags" if adapter else "use --method"
            message = f"the {decided_by} already decides what trains"
            raise UserError(message, code="flag-conflict", where=" ".join(decides), hint=hint)
        return layer, []
    layer["policy"], line = _rules_of_llava(request)
    quantized = f", with the base quantised to {flags['bits']} bits" if "quantization" in layer else ""
    return layer, [f"LLaVA flags: {line}{quantized}"]


def _rules_of_llava(request: Request) -> tuple[list[RuleDict], str]:
    flags, edits = request.llava, request.edits
    projector, end = {"modules": "projector", "method": "full"}, "the projector in full"
    if flags.get("tune_mm_mlp_adapter"):
        return [projector], "--tune_mm_mlp_adapter True trains only the projector"
    if flags.get("lora_enable") or edits.method in ADAPTERS:
        given = {name: value for name, value in asdict(edits).items() if value is not None}
        rule = {"rank": 64, "alpha": 16, "dropout": 0.05} | given
        fields = {name: rule[name] for name in ("rank", "alpha", "dropout")}
        line = f"--lora_enable True trains an adapter of rank {rule['rank']} on the language tower"
        return [{"modules": "language", "method": DEFAULT_RULES[0]["method"], **fields}, projector], f"{line} and {end}"
    line = "without --lora_enable the whole language tower trains in full, embeddings and head included"
    return [{"modules": "language.*", "method": "full"}, projector], f"{line}, and {end}"
