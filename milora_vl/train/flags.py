"""The command line of `milora_vl.train`: its parser, made from the recipe and TrainingArguments; `Request`; `edited`.

`edited` applies the flags of the policy (`--method`, `--protect`, `--rank`, ...) to the rules of a recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch

from milora_vl.common.cli import console as cli
from milora_vl.common.cli import parser as cli_flags
from milora_vl.common.errors import Problem, UserError
from milora_vl.common.yaml_text import parse_yaml
from milora_vl.core.policy.rules import DEFAULT_RULES, RuleDict
from milora_vl.core.policy.rules import METHODS as RULE_METHODS
from milora_vl.train import arguments, llava_flags
from milora_vl.train.recipe import flags_of

PROG = "python -m milora_vl.train"
DESCRIPTION = "Fine-tune a vision-language or text model and keep what it knows. Flags override the recipe."
EPILOG = f"""examples:
  {PROG} --recipe smol-llava-demo --output_dir runs/demo
  {PROG} --model llava-1.5-7b --data_path train.json --image_folder images --output_dir runs/a
  {PROG} --model llava-1.5-7b --dry-run
LLaVA's scripts run with only their program name changed; all TrainingArguments flags of transformers are recognized."""
ADAPTERS = tuple(name for name, method in RULE_METHODS.items() if "rank" in method.fields)
METHODS = (*ADAPTERS, "full", "projector")
ADAPTER_FIELDS = ("rank", "alpha", "rslora", "dropout", "sigma", "seed", "protect")
# flag -> (what converts its text, other spellings, help)
Flags = dict[str, tuple[Callable[[str], Any], tuple[str, ...], str]]
POLICY_FLAGS: Flags = {
    "method": (str, (), f"method of the adapter rules; drops their protect: {', '.join(METHODS)}"),
    "protect": (
        float,
        (),
        "share of the input energy of ordinary text and pictures that updates leave alone; 0: none "
        f"[milora: {RULE_METHODS['milora'].protect}, other methods: 0; 0 with milora is the paper's method]",
    ),
    "rank": (int, ("lora_r",), "rank of the adapter rules, as PEFT stores it; doubled by an anchor"),
    "alpha": (float, ("lora_alpha",), "alpha of the adapter rules; the scale is alpha/rank"),
    "dropout": (float, ("lora_dropout",), "dropout of the adapter rules"),
    "mm_projector_lr": (float, (), "learning rate of the projector"),
}
RUN_FLAGS: Flags = {
    "recipe": (str, ("config",), "a recipe by name (see --list-recipes), a YAML file, or a run folder"),
    "policy": (str, (), "rules as YAML text or a YAML file; replaces the recipe's"),
    "output_dir": (str, (), "run folder; default runs/MODEL/METHOD/TIME"),
    "resume_from_checkpoint": (str, ("resume",), "true, a checkpoint folder, or auto (resume if possible)"),
    "device": (str, (), "cpu or cuda; the default is cuda if it is available"),
    "dry_run": (bool, (), "check the settings and print the plan; needs no weights and no network"),
    "devices": (cli_flags.positive, (), "with --dry-run: number of devices to plan for"),
    "gpu_memory": (
        cli_flags.above_zero,
        (),
        "with --dry-run: GiB per device; shows whether the run fits, or the flags that help",
    ),
    "print_recipe": (str, (), "print a recipe with every key and its default"),
    "list_models": (bool, (), "print the named models"),
    "list_recipes": (bool, (), "print the recipes"),
    "format": (str, (), "format of plans, lists and results on stdout: human or json"),
}
# Flags whose value may be left out, with the value that they have then.
BARE = {"resume_from_checkpoint": "true", "print_recipe": "", "fsdp": "full_shard"}
# Hugging Face's most used flags; those with a text mean more here than Hugging Face's help says.
EVERYDAY = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "bf16", "gradient_checkpointing", "deepspeed", "fsdp",
    "dataloader_num_workers", "logging_steps", "save_steps", "save_total_limit", "report_to", "seed",
)  # fmt: skip
ALIASES = {"template": {"v1": "vicuna_v1"}, "image_aspect_ratio": {"square": "plain"}}
ACTIONS = ("print_recipe", "list_models", "list_recipes", "dry_run")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEdits:
    """Flags that replace a field in the rules; None keeps the field."""

    method: str | None = None
    protect: float | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    learning_rate: float | None = None
    mm_projector_lr: float | None = None


@dataclass(frozen=True)
class Request:
    recipe: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)  # nested as the recipe is
    flags: dict[str, str] = field(default_factory=dict)  # dotted keys of `overrides` -> their flags
    edits: PolicyEdits = field(default_factory=PolicyEdits)
    policy: str | None = None
    llava: dict[str, Any] = field(default_factory=dict)
    output_dir: str | None = None
    resume: str | None = None
    format: str = "human"
    action: str = "train"  # train | dry_run | print_recipe | list_models | list_recipes
    argument: str = ""  # argument of the action
    devices: int | None = None  # for a plan
    gpu_memory: float | None = None  # GiB per device, for a plan
    words: tuple[str, ...] = field(default=(), compare=False)  # the command line as typed


def build_parser() -> argparse.ArgumentParser:
    parser = cli_flags.parser(PROG, DESCRIPTION, EPILOG)
    parser.usage = "%(prog)s [flags]"
    group = parser.add_argument_group("the run")
    for name, (convert, others, text) in RUN_FLAGS.items():
        _add(group, (name, *others), convert, text, f"run.{name}")
    group = parser.add_argument_group("fields of the recipe")
    for key, flag, annotation in flags_of():
        _add(group, (flag.name, *flag.others), _type_of(annotation), flag.help, f"recipe.{key}")
    group = parser.add_argument_group("the policy")
    for name, (convert, others, text) in POLICY_FLAGS.items():
        _add(group, (name, *others), convert, text, f"policy.{name}")
    group = parser.add_argument_group("the training (Hugging Face's most used)")
    rest = parser.add_argument_group("all other TrainingArguments of Hugging Face")
    for name, argument in arguments.known().items():
        if name not in RUN_FLAGS:
            help_ = argparse.SUPPRESS if "deprecated" in argument.help.lower() else argument.help
            kind = bool if argument.is_switch else list if argument.is_list else str
            _add(group if name in EVERYDAY else rest, (name,), kind, help_, f"hf.{name}")
    group = parser.add_argument_group("LLaVA's other flags")
    for name, (convert, text) in llava_flags.FLAGS.items():
        _add(group, (name,), convert, text, f"llava.{name}")
    return parser


def _type_of(annotation: Any) -> type:
    """Return what a flag converts its text to, for the annotation of a key."""
    kinds = {annotation, *get_args(annotation)}
    kinds |= {inner for kind in kinds for inner in get_args(kind)}
    return next((kind for kind in (bool, int, float) if kind in kinds), str)


def _add(group: Any, names: Sequence[str], convert: Callable[..., Any], text: str, dest: str) -> None:
    options: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if names[0] in BARE:
        options |= {"nargs": "?", "const": BARE[names[0]]}
    elif convert is bool:
        options |= {"nargs": "?", "const": True, "type": _named(arguments.boolean, "true or false")}
    elif convert is list:
        options |= {"nargs": "*"}
    elif convert in (int, float):
        options |= {"type": _named(convert, "a whole number" if convert is int else "a number")}
    else:
        options |= {"type": convert}
    metavar: dict[Any, str] = {bool: "BOOL", int: "N", float: "X", cli_flags.positive: "N", cli_flags.above_zero: "X"}
    group.add_argument(*(f"--{name}" for name in names), metavar=metavar.get(convert, "TEXT"), **options)


def _named(convert: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    return checked


def parse(argv: Sequence[str] | None) -> Request:
    """Return the request in `argv` (default: the command line of the process). Raises UserError for wrong flags."""
    sections: dict[str, dict[str, Any]] = {"run": {}, "recipe": {}, "policy": {}, "llava": {}, "hf": {}}
    for dest, value in vars(build_parser().parse_args(argv)).items():
        section, _, name = dest.partition(".")
        sections[section][name] = value
    run, edits = sections["run"], sections["policy"]
    _require_known(run, edits)
    train, problems = {}, []
    for name, value in sections["hf"].items():
        try:
            train[name] = arguments.coerce(name, value)
        except ValueError as error:
            problems.append(Problem(str(error), "flag-value", f"--{name}"))
    if problems:
        raise UserError(problems=problems)
    if run.get("device") == "cpu":
        train["use_cpu"] = True
    overrides: dict[str, Any] = {"train": train} if train else {}
    flags = {f"train.{arguments.RENAMED.get(name, name)}": f"--{name}" for name in sections["hf"]}
    names = {key: flag.name for key, flag, _ in flags_of()}
    for key, value in sections["recipe"].items():
        section, _, name = key.rpartition(".")
        inner = overrides.setdefault(section, {}) if section else overrides
        inner[name] = ALIASES.get(name, {}).get(value, value)
        if name == "attn_implementation" and value.startswith("{"):  # one per tower
            inner[name] = parse_yaml(value)
        flags[key] = f"--{names[key]}"
    actions = [name for name in ACTIONS if run.get(name, False) is not False]
    return Request(
        recipe=run.get("recipe"),
        overrides=overrides,
        flags=flags,
        edits=PolicyEdits(learning_rate=train.get("learning_rate"), **edits),
        policy=run.get("policy"),
        llava=sections["llava"],
        output_dir=run.get("output_dir"),
        resume=run.get("resume_from_checkpoint"),
        format=run.get("format", "human"),
        action=actions[0] if actions else "train",
        devices=run.get("devices"),
        gpu_memory=run.get("gpu_memory"),
        argument=str(run.get("print_recipe", "")),
        words=tuple(sys.argv[1:] if argv is None else argv),
    )


def _require_known(run: dict[str, Any], edits: dict[str, Any]) -> None:
    words = {"format": ("human", "json"), "device": ("cpu", "cuda"), "method": METHODS}
    for name, known in words.items():
        value = {**run, **edits}.get(name)
        if value not in (None, *known):
            near = cli.did_you_mean(cli.suggest(str(value), known)[:1])
            raise UserError(
                f"expected {', '.join(known)}, got {value!r}", code="flag-value", where=f"--{name}", hint=near
            )
    planned = [f"--{name}" for name in ("devices", "gpu_memory") if name in run]
    if planned and not run.get("dry_run"):
        hint = "the launcher sets the devices of a run"
        raise UserError("works only with --dry-run", code="flag-conflict", where=" ".join(planned), hint=hint)
    if run.get("device") == "cuda" and not run.get("dry_run") and not torch.cuda.is_available():
        hint = "to train on the CPU:  --device cpu"
        raise UserError("PyTorch finds no CUDA device", code="device-no-cuda", where="--device", hint=hint)


def edited(rules: Sequence[RuleDict] | None, edits: PolicyEdits) -> list[RuleDict]:
    """Return the rules after the flags; `full` and `frozen` rules keep their fields.

    A method drops `protect` and `sigma` of the rules, and milora has the scale 1, so that a method is its authors'.

    Raises UserError for a flag without effect.

    >>> edited(None, PolicyEdits(method="lora", rank=8))[0]["alpha"]  # the scale alpha/rank stays 1
    8.0
    """
    original = DEFAULT_RULES if rules is None else rules
    out = [dict(rule) for rule in original]
    adapters = [is_adapter(rule) for rule in out]
    _refuse_useless(any(adapters), edits)
    for rule, adapts in zip(out, adapters, strict=True):
        if adapts:
            _edit_adapter(rule, edits)
    if edits.method == "full":
        out = [_without_adapter(rule) if adapts else rule for rule, adapts in zip(out, adapters, strict=True)]
    # Drop a rule that only refined the old method. A rule that was empty before stays: its error is reported later.
    out = [rule for rule, before in zip(out, original, strict=True) if len(rule) > 1 or rule == before]
    if edits.method == "projector":
        in_full = {"modules": "projector", "method": "full"}
        out = [rule for rule in out if of_projector(rule) and not is_adapter(rule)] or [in_full]
        if edits.learning_rate is not None:
            out[0]["learning_rate"] = edits.learning_rate
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
    if edits.method in ("full", "projector"):
        if flags:
            message = f"no effect with --method {edits.method}, which makes no adapter"
            hint = "leave these flags out, or use a method with adapters, such as milora"
            raise UserError(message, code="flag-no-effect", where=" ".join(flags), hint=hint)
    elif not has_adapters and (flags or edits.method):
        where = "--method" if edits.method else flags[0]
        hint = f"add one with --policy, or use a recipe that has one: {PROG} --list-recipes"
        raise UserError("no rule of the recipe makes an adapter", code="policy-no-adapter-rule", where=where, hint=hint)


def _edit_adapter(rule: RuleDict, edits: PolicyEdits) -> None:
    if edits.method in ADAPTERS:
        if "method" in rule:
            rule["method"] = edits.method
        dropped = {"sigma"} | ({"seed"} - RULE_METHODS[edits.method].fields)  # of the initial factors of the recipe
        for name in dropped | {"protect"}:
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
