"""Every flag of `milora_vl.train`: the parser, help texts, aliases, and `Request`, the parsed command line.

It imports nothing slow, so `--help` prints at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from milora_vl.common.cli import command_line as cli
from milora_vl.common.cli import flags as cli_flags
from milora_vl.common.errors import Problem, UserError
from milora_vl.core.policy.rules import METHODS as RULE_METHODS
from milora_vl.train.recipe import hf_flags, llava_flags
from milora_vl.train.recipe.layers import RecipeFile, read_recipe
from milora_vl.train.recipe.policy_edits import METHODS, PolicyEdits

PROG = "python -m milora_vl.train"
DESCRIPTION = "Fine-tune a vision-language or text model and keep what it knows. Flags override the recipe."
EPILOG = f"""examples:
  {PROG} --recipe smol-llava-demo --output_dir runs/demo
  {PROG} --model llava-1.5-7b --data_path train.json --image_folder images --output_dir runs/a
  {PROG} --model llava-1.5-7b --dry-run
LLaVA's scripts run with only their program name changed; all TrainingArguments flags of transformers are recognized."""

# flag -> (dotted path in the recipe, type, other spellings, help)
RECIPE_FLAGS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "model": ("model", "str", ("model_name_or_path",), "a named model, a folder or a hub id; see --list-models"),
    "adapter": (
        "adapter",
        "str",
        ("lora_weight_path",),
        "adapter to train further on its data, such as the output_dir of a run; it decides rules, template and base",
    ),
    "after": (
        "after",
        "str",
        (),
        "run whose update stays: a new adapter learns other data beside it, off the inputs of its records",
    ),
    "data_path": ("data.path", "str", (), cli_flags.RECORDS),
    "image_folder": ("data.image_folder", "str", (), "folder that the image paths of the records are relative to"),
    "eval_data_path": ("data.eval_path", "str", (), "held-out records for the evaluation loss"),
    "limit": ("data.limit", "int", (), "use only the first N records"),
    "max_length": (
        "data.max_length",
        "int",
        ("model_max_length",),
        "longest sequence in tokens, image tokens included",
    ),
    "min_pixels": (
        "data.min_pixels",
        "int",
        (),
        "least pixels of a resized picture (Qwen-VL, GLM-V)",
    ),
    "max_pixels": (
        "data.max_pixels",
        "int",
        (),
        "most pixels of a resized picture; limits its tokens",
    ),
    "video_min_pixels": (
        "data.video_min_pixels",
        "int",
        (),
        "least pixels of a resized video: per frame (Qwen2-VL), or of all frames (Qwen3-VL, GLM-4V)",
    ),
    "video_max_pixels": ("data.video_max_pixels", "int", (), "most pixels of a resized video; limits its tokens"),
    "fps": ("data.fps", "float", (), "frames per second to read of video files (default: the processor's, or 2)"),
    "num_frames": ("data.num_frames", "int", (), "frames to read of each video file, in place of --fps"),
    "image_aspect_ratio": ("data.image_aspect_ratio", "str", (), "pad, plain (LLaVA: square), or anyres (LLaVA-1.6)"),
    "packing": ("data.packing", "bool", (), "pack several records into one row to reduce padding"),
    "streaming": ("data.streaming", "bool", (), "read records while training; needs --max_steps"),
    "shuffle_buffer": ("data.shuffle_buffer", "int", (), "number of streamed records in the shuffle buffer"),
    "web_pictures": (
        "data.web_pictures",
        "str",
        (),
        "pictures named by web addresses: refuse (default), or download, each once into the cache",
    ),
    "bad_images": ("data.bad_images", "str", (), "what to do about missing or broken images: raise, skip or replace"),
    "template": (
        "template",
        "str",
        ("version",),
        "prompt format, e.g. vicuna_v1 (LLaVA: v1), plain or chat_template (the template of the model)",
    ),
    "factor_cache": ("factor_cache", "str", (), "folder that caches the initial factors for later runs"),
    "quantization": ("quantization", "str", (), "none, 4bit or 8bit"),
    "quant_type": ("quant_type", "str", (), "4-bit data type of the base: nf4 or fp4"),
    "double_quant": ("double_quant", "bool", (), "also quantise the constants of a 4-bit base"),
    "dtype": ("dtype", "str", (), "data type of the frozen weights: auto, float32, bfloat16, float16 or fastest"),
    "attn_implementation": (
        "attn_implementation",
        "str",
        (),
        "attention by its name in transformers: sdpa (default), eager, flash_attention_2, ...; or one per tower",
    ),
    "eval_suite_every": (
        "eval.suite_every",
        "int",
        (),
        "score the suites of the recipe every N steps and at the last step",
    ),
    "eval_suite_limit": ("eval.suite_limit", "int", (), "questions per benchmark during training"),
    "forgetting_every": ("eval.forgetting_every", "int", (), "measure forgetting every N steps and at the last step"),
    "calibration_samples": (
        "calibration.samples",
        "int",
        (),
        "texts that the base writes to find protected inputs [48]",
    ),
    "calibration_pictures": ("calibration.pictures", "int", (), "pictures that the base describes for it [32]"),
    "base_kl_weight": (
        "base_kl.weight",
        "float",
        (),
        "weight of a term of the loss that keeps the base's answers on the calibration texts [1 if protected milora "
        "trains a model that reads pictures, else 0]",
    ),
    "projector_weights": (
        "projector_weights",
        "str",
        ("pretrain_mm_mlp_adapter",),
        "initial weights of the projector",
    ),
}
# flag -> (field of PolicyEdits, type, other spellings, help)
POLICY_FLAGS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "method": ("method", "str", (), f"method of the adapter rules; drops their protect: {', '.join(METHODS)}"),
    "protect": (
        "protect",
        "float",
        (),
        "share of the input energy of ordinary text and pictures that updates leave alone; 0: none "
        f"[milora: {RULE_METHODS['milora'].protect}, other methods: 0; 0 with milora is the paper's method]",
    ),
    "rank": ("rank", "int", ("lora_r",), "rank of the adapter rules, as PEFT stores it; doubled by an anchor"),
    "alpha": ("alpha", "float", ("lora_alpha",), "alpha of the adapter rules; the scale is alpha/rank"),
    "dropout": ("dropout", "float", ("lora_dropout",), "dropout of the adapter rules"),
    "mm_projector_lr": ("projector_learning_rate", "float", (), "learning rate of the projector"),
}
RUN_FLAGS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "recipe": ("str", ("config",), "a recipe by name (see --list-recipes), a YAML file, or a run folder"),
    "policy": ("str", (), "rules as YAML text or a YAML file; replaces the recipe's"),
    "output_dir": ("str", (), "run folder; default runs/MODEL/METHOD/TIME"),
    "resume_from_checkpoint": (
        "str",
        ("resume",),
        "true, a checkpoint folder, or auto (resume if possible)",
    ),
    "device": ("str", (), "cpu or cuda; the default is cuda if it is available"),
    "dry_run": ("bool", (), "check the settings and print the plan; needs no weights and no network"),
    "devices": ("int", (), "with --dry-run: number of devices to plan for"),
    "gpu_memory": (
        "float",
        (),
        "with --dry-run: GiB per device; shows whether the run fits, or the flags that help",
    ),
    "print_recipe": ("str", (), "print a recipe with every key and its default"),
    "list_models": ("bool", (), "print the named models"),
    "list_recipes": ("bool", (), "print the recipes"),
    "format": ("str", (), "format of plans, lists and results on stdout: human or json"),
}
# Hugging Face's most used flags with help texts of ours; the other flags keep the help text of Hugging Face.
EVERYDAY: dict[str, str] = {
    "num_train_epochs": "number of epochs [3]",
    "max_steps": "number of steps; overrides the number of epochs",
    "per_device_train_batch_size": "records per device and batch [8]",
    "gradient_accumulation_steps": "batches per optimizer step [1]",
    "learning_rate": "learning rate of adapter rules and of rules without one [from the recipe; default policy: 2e-4]",
    "lr_scheduler_type": "linear, cosine, constant, ... [linear]",
    "warmup_steps": "number of warm-up steps; below 1: a share of all steps [0]",
    "bf16": "compute in bfloat16 [False]",
    "gradient_checkpointing": "save memory for about half more time [False]",
    "deepspeed": "zero2, zero3, zero3_offload, or a JSON file",
    "fsdp": "shard the model with FSDP2: full_shard [default of the bare flag] or shard_grad_op",
    "dataloader_num_workers": "number of processes that prepare batches [0]",
    "logging_steps": "log the loss every N steps [10]",
    "save_steps": "save a checkpoint every N steps [500]",
    "save_total_limit": "keep the newest N checkpoints [all]",
    "report_to": "tensorboard, wandb, trackio, ... [none]",
    "seed": "random seed of data order, dropout and random initialization [42]",
}
FORMATS = ("human", "json")
ALIASES = {"template": {"v1": "vicuna_v1"}, "image_aspect_ratio": {"square": "plain"}}
ACTIONS = ("print_recipe", "list_models", "list_recipes", "dry_run")
TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": hf_flags.boolean}


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    recipe: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)  # nested as the recipe is
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
    problems: tuple[Problem, ...] = ()  # of values that are left out; `merge` raises them with its own
    file: RecipeFile | None = None  # the recipe, if it is no file

    @cached_property
    def recipe_file(self) -> RecipeFile:
        """The recipe, read once: an edit during the run does not change its settings and the lines in its errors."""
        return self.file or read_recipe(self.recipe)

    def sets(self, path: str) -> bool:
        """Return whether a flag of the recipe's fields sets the key at the dotted path."""
        *section, name = path.split(".")
        return name in (self.overrides.get(section[0], {}) if section else self.overrides)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all flags; `_` and `-` are interchangeable in flag names."""
    parser = cli_flags.parser(PROG, DESCRIPTION, EPILOG)
    parser.usage = "%(prog)s [flags]"
    group = parser.add_argument_group("the run")
    for name, (type_, aliases, text) in RUN_FLAGS.items():
        _add(group, name, type_, aliases, text, dest=f"run.{name}")
    group = parser.add_argument_group("fields of the recipe")
    for name, (path, type_, aliases, text) in RECIPE_FLAGS.items():
        _add(group, name, type_, aliases, text, dest=f"recipe.{path}")
    group = parser.add_argument_group("the policy")
    for name, (path, type_, aliases, text) in POLICY_FLAGS.items():
        _add(group, name, type_, aliases, text, dest=f"policy.{path}")
    group = parser.add_argument_group("the training (Hugging Face's most used)")
    for name, text in EVERYDAY.items():
        _add(group, name, hf_flags.flags()[name].type, (), text, dest=f"hf.{name}")
    group = parser.add_argument_group("LLaVA's other flags")
    for name, (type_, text) in llava_flags.FLAGS.items():
        _add(group, name, type_, (), text, dest=f"llava.{name}")
    group = parser.add_argument_group("all other TrainingArguments of Hugging Face")
    for name, flag in hf_flags.flags().items():
        if name not in RUN_FLAGS and name not in EVERYDAY:
            text = argparse.SUPPRESS if "deprecated" in flag.help.lower() else f"{flag.help} [{flag.default}]"
            text = hf_flags.HELP.get(name, text)
            _add(group, name, flag.type, (), text, dest=f"hf.{name}")
    return parser


def parse(argv: Sequence[str] | None) -> Request:
    """Return the request in `argv` (default: the command line of the process).

    Values that are wrong by themselves are in its `problems`; raises UserError for flags that exclude each other.
    """
    arguments = vars(build_parser().parse_args(argv))
    sections: dict[str, dict[str, Any]] = {"run": {}, "recipe": {}, "policy": {}, "llava": {}, "hf": {}}
    for dest, value in arguments.items():
        section, _, name = dest.partition(".")
        sections[section][name] = value
    problems: list[Problem] = []
    run, train = sections["run"], _train_flags(sections["hf"], sections["run"], problems)
    method = sections["policy"].get("method")
    if method not in (None, *METHODS):
        near = cli.did_you_mean(cli.suggest(str(method), METHODS))
        problems.append(
            Problem(
                f"expected {', '.join(METHODS)}, got {method!r}",
                "flag-value",
                "--method",
                near or f"for example  --method {METHODS[0]}",
            )
        )
        del sections["policy"]["method"]
    edits = PolicyEdits(learning_rate=train.get("learning_rate"), **sections["policy"])
    overrides = _nested({name: _alias(name, value) for name, value in sections["recipe"].items()})
    if train:
        overrides["train"] = train
    planned = [name for name in ("devices", "gpu_memory") if name in run]
    if planned and not run.get("dry_run"):
        raise UserError(
            "works only with --dry-run",
            code="flag-conflict",
            where=f"--{' --'.join(planned)}",
            hint="the launcher sets the devices of a run",
        )
    for name in planned:
        if run[name] <= 0:
            problems.append(Problem(f"must be above 0, got {run[name]}", "flag-value", f"--{name}"))
    if run.get("format", "human") not in FORMATS:
        message = f"expected {' or '.join(FORMATS)}, got {run['format']!r}"
        raise UserError(message, code="flag-value", where="--format", hint="json is for programs, human for people")
    actions = [name for name in ACTIONS if run.get(name, False) is not False]
    return Request(
        recipe=run.get("recipe"),
        overrides=overrides,
        edits=edits,
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
        problems=tuple(problems),
    )


def _add(group: Any, name: str, type_: str, aliases: Sequence[str], text: str, *, dest: str) -> None:
    flags = [f"--{name}", *(f"--{alias}" for alias in aliases)]
    options: dict[str, Any] = {
        "dest": dest,
        "default": argparse.SUPPRESS,
        "help": text.replace("%", "%%"),
    }
    if type_ == "bool":
        options |= {"nargs": "?", "const": True, "type": _named(hf_flags.boolean, "true or false")}
    elif type_ == "list":
        options |= {"nargs": "*"}
    elif name in ("resume_from_checkpoint", "print_recipe"):
        options |= {"nargs": "?", "const": "true" if name.startswith("resume") else ""}
    elif name == "fsdp":
        options |= {"nargs": "?", "const": "full_shard"}
    elif dest.startswith("hf."):
        options |= {"type": str}  # `_train_flags` converts it, as for YAML, so that both give the same message
    else:
        options |= {"type": _named(TYPES[type_], hf_flags.EXPECTED[type_])}
    metavar = {"int": "N", "float": "X", "bool": "BOOL"}.get(type_, "TEXT")
    group.add_argument(*flags, metavar=metavar, **options)


def _named(convert: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    return checked


def _train_flags(flags: dict[str, Any], run: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Return the values of Hugging Face's flags in their types; those that are wrong go to `problems`."""
    train = {}
    for name, value in flags.items():
        try:
            train[name] = hf_flags.coerce(name, value)
        except hf_flags.WrongValue as error:
            problems.append(Problem(str(error), "flag-value", f"--{name}", error.hint))
    if run.get("device") == "cpu":
        train["use_cpu"] = True
    elif run.get("device") not in (None, "cuda"):
        message = f"expected cpu or cuda, got {run['device']!r}"
        near = cli.did_you_mean(cli.suggest(run["device"], ("cpu", "cuda"))[:1])
        hint = near or "a launcher (torchrun, accelerate) gives each process its GPU; CUDA_VISIBLE_DEVICES selects one"
        raise UserError(message, code="flag-value", where="--device", hint=hint)
    elif "device" in run and not run.get("dry_run") and not _has_cuda():
        raise UserError(
            "PyTorch finds no CUDA device",
            code="device-no-cuda",
            where="--device",
            hint="to train on the CPU:  --device cpu",
        )
    return train


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _alias(path: str, value: Any) -> Any:
    return ALIASES.get(path.rpartition(".")[2], {}).get(value, value)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        inner = out
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return out
