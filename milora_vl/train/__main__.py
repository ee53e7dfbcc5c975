"""`python -m milora_vl.train`: the flags, made from the recipe and TrainingArguments, and what each action does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import llava_recipes
from milora_vl.common.cli import console as cli
from milora_vl.common.cli import parser as cli_flags
from milora_vl.common.errors import Problem, UserError, did_you_mean, suggest
from milora_vl.common.yaml_text import parse_yaml
from milora_vl.core.policy.rules import METHODS as RULE_METHODS
from milora_vl.models.names import NAMED_MODELS
from milora_vl.train.settings import (
    LLAVA_FLAGS,
    METHODS,
    PROG,
    RENAMED,
    PolicyEdits,
    Recipe,
    Request,
    boolean,
    coerced,
    flags_of,
    known_arguments,
    read_recipe,
)

DESCRIPTION = "Fine-tune a vision-language or text model and keep what it knows. Flags override the recipe."
EPILOG = f"""examples:
  {PROG} --recipe smol-llava-demo --output_dir runs/demo
  {PROG} --model llava-1.5-7b --data_path train.json --image_folder images --output_dir runs/a
  {PROG} --model llava-1.5-7b --dry-run
LLaVA's scripts run with only their program name changed; all TrainingArguments flags of transformers are recognized."""
# flag -> (what converts its text, other spellings, help)
Flags = dict[str, tuple[Callable[[str], Any], tuple[str, ...], str]]
POLICY_FLAGS: Flags = {
    "train": (str, (), "keep the rules of one tower alone: language or projector"),
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
    for name, argument in known_arguments().items():
        if name not in RUN_FLAGS:
            help_ = argparse.SUPPRESS if "deprecated" in argument.help.lower() else argument.help
            _add(group if name in EVERYDAY else rest, (name,), argument.flag_kind, help_, f"hf.{name}")
    group = parser.add_argument_group("LLaVA's other flags")
    for name, (convert, text) in LLAVA_FLAGS.items():
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
        options |= {"nargs": "?", "const": True, "type": _named(boolean, "true or false")}
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
            train[name] = coerced(name, value)
        except ValueError as error:
            problems.append(Problem(str(error), "flag-value", f"--{name}"))
    if problems:
        raise UserError(problems=problems)
    if run.get("device") == "cpu":
        train["use_cpu"] = True
    overrides: dict[str, Any] = {"train": train} if train else {}
    flags = {f"train.{RENAMED.get(name, name)}": f"--{name}" for name in sections["hf"]}
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
    words = {
        "format": ("human", "json"),
        "device": ("cpu", "cuda"),
        "method": METHODS,
        "train": ("language", "projector"),
    }
    for name, known in words.items():
        value = {**run, **edits}.get(name)
        if value not in (None, *known):
            near = did_you_mean(suggest(str(value), known)[:1])
            raise UserError(
                f"expected {', '.join(known)}, got {value!r}", code="flag-value", where=f"--{name}", hint=near
            )
    planned = [f"--{name}" for name in ("devices", "gpu_memory") if name in run]
    if planned and not run.get("dry_run"):
        hint = "the launcher sets the devices of a run"
        raise UserError("works only with --dry-run", code="flag-conflict", where=" ".join(planned), hint=hint)
    if run.get("device") == "cuda" and not run.get("dry_run"):
        import torch

        if not torch.cuda.is_available():
            hint = "to train on the CPU:  --device cpu"
            raise UserError("PyTorch finds no CUDA device", code="device-no-cuda", where="--device", hint=hint)


def main(argv: Sequence[str] | None = None) -> int:
    request = parse(argv)
    if request.action in ("print_recipe", "list_models", "list_recipes"):
        return show_list(request)
    from milora_vl.train.join_settings import join_settings  # it imports torch, which takes seconds

    settings = join_settings(request)
    with settings.places():
        if request.action == "dry_run":
            from milora_vl.train.plan import show

            return show(settings)
        from milora_vl.train import run

        return run.train(settings)


def show_list(request: Request) -> int:
    as_json = request.format == "json"
    if request.action == "print_recipe":
        text = _recipe_text(request, as_json=as_json)
    else:
        rows: Mapping[str, str] = {name: str(model) for name, model in NAMED_MODELS.items()}
        if request.action == "list_recipes":
            rows = {name: llava_recipes.read(name).splitlines()[0].lstrip("# ") for name in llava_recipes.names()}
        width = max(map(len, rows))
        table = "".join(f"{name:<{width}}  {about}\n" for name, about in rows.items())
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n" if as_json else table
    sys.stdout.write(text)
    return 0


def _recipe_text(request: Request, *, as_json: bool) -> str:
    """Return a recipe with every key, as JSON or YAML. Those of `train` that it does not set are in --help."""
    name = request.argument or request.recipe
    if not name:
        message = f"expected the name of a recipe: {', '.join(llava_recipes.names())}"
        raise UserError(message, code="flag-required", where="--print-recipe", hint=f"see: {PROG} --list-recipes")
    recipe = Recipe.parse(*read_recipe(name, "--print_recipe" if request.argument else "--recipe"))
    if as_json:
        return json.dumps(recipe.model_dump(mode="json")) + "\n"
    source = llava_recipes.read(name) if name in llava_recipes.names() else ""
    comment = "".join(line for line in source.splitlines(keepends=True) if line.startswith("#"))
    return comment + recipe.to_yaml()


if __name__ == "__main__":
    cli.run(main)
