"""HF's TrainingArguments from a recipe: names of the installed version, packaged DeepSpeed files, what a run forces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import llava_recipes
from milora_data.command import suggest
from milora_data.errors import UserError
from milora_vl.models.devices import fastest_dtype, train_device
from milora_vl.plan import cpu_load, launch
from milora_vl.recipe import hf_arguments
from milora_vl.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

# The collator needs every field of a record, the loss is computed by us, and a NaN must be seen.
FORCED = {
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "prediction_loss_only": True,
    "logging_nan_inf_filter": False,
}
# Of example scripts: the command trains, and evaluates where there are records for it.
NO_EFFECT = ("do_eval", "do_predict", "batch_eval_metrics", "include_for_metrics")


def make(recipe: Recipe, output_dir: Path) -> tuple[TrainingArguments, list[str]]:
    """The arguments and warnings about settings that have no effect. UserError with HF's own words where it refuses."""
    import dataclasses

    from transformers import TrainingArguments

    train, warnings = prepared(recipe)
    device = train_device(train)
    if train.get("bf16") and device.type == "cpu" and fastest_dtype(device) != torch.bfloat16:
        warnings.append("bf16 is emulated by this CPU, which is slow (faster: --dtype float32 --bf16 False)")
    launch.check(train)
    fields = {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init}
    arguments, absent = hf_arguments.for_installed(train, fields)
    if absent:
        warnings.append(f"the installed transformers has no {', '.join(absent)}: without effect")
    try:
        launch.before_arguments(train)
        args = TrainingArguments(output_dir=str(output_dir), **arguments)
        launch.after_arguments(train)
    except (ValueError, ImportError, TypeError) as error:
        raise UserError(f"train: {error}") from None
    if args.n_gpu > 1:
        # torch's DataParallel would split a batch's pictures apart from its records.
        warnings.append(
            f"one of {args.n_gpu} GPUs is used; for all: torchrun --nproc_per_node {args.n_gpu} -m milora_vl.train ..."
        )
        args._n_gpu = 1
    return args, [*warnings, *cpu_load.warnings(args.device.type, args.world_size)]


def prepared(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """The `train:` section as the run uses it, in canonical names, and warnings."""
    train, warnings = dict(recipe.train), []
    for name, value in FORCED.items():
        if train.get(name, value) != value:
            warnings.append(f"train.{name}: {train[name]} has no effect; it is {value} here")
        train[name] = value
    unused = [name for name in NO_EFFECT if train.pop(name, None)]
    if train.get("train_sampling_strategy") == "group_by_length":
        del train["train_sampling_strategy"]  # our sampler does it: HF's needs tokenised records
    if unused:
        warnings.append(f"without effect here: {', '.join(unused)}")
    if given := train.get("deepspeed"):
        named = isinstance(given, str)
        train["deepspeed"], notes = launch.deepspeed_settings(deepspeed_config(given) if named else given)
        warnings += notes
        if recipe.quantization != "none" and train["deepspeed"].get("zero_optimization", {}).get("stage") == 3:
            raise UserError(
                f"quantization {recipe.quantization}: ZeRO-3 cannot share out a quantised base\n"
                "say --deepspeed zero2, as LLaVA's finetune_qlora.sh does"
            )
    if recipe.dtype in ("bfloat16", "float16"):
        train.setdefault("bf16" if recipe.dtype == "bfloat16" else "fp16", True)
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        train.setdefault("use_cpu", True)  # HF refuses bf16 on a CPU unless it is told so
    # A batch without pictures holds a hidden one, so all that trains is used, but for layers of the vision tower that
    # LLaVA does not read.
    rules = [str(rule.get("modules", "")) for rule in recipe.policy or ()]
    train.setdefault("ddp_find_unused_parameters", any(_may_be_unused(rule) for rule in rules))
    if train_device(train).type != "cuda":
        train.setdefault("dataloader_pin_memory", False)
        if train.pop("tf32", None):
            warnings.append("train.tf32 has no effect on a CPU")
    _evaluation(train, recipe)
    return train, warnings


def deepspeed_config(name: str) -> Any:
    """The configuration of a packaged name (zero2, zero3, zero3_offload), or a file's path unchanged."""
    if name in llava_recipes.names("deepspeed"):
        return json.loads(llava_recipes.read(name, "deepspeed"))
    if Path(name).is_file():
        return name
    near = suggest(Path(name).stem, llava_recipes.names("deepspeed"))
    raise UserError(
        f"--deepspeed {name}: no such file, and none of {', '.join(llava_recipes.names('deepspeed'))}"
        + (f"\nthe packaged one: --deepspeed {near[0]}" if near else "")
    )


def zero_stage(args: TrainingArguments) -> int:
    """The stage of ZeRO that a run trains in, 0 without DeepSpeed."""
    return int(args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)) if args.deepspeed else 0


def base_dtype(recipe: Recipe, train: dict[str, Any]) -> torch.dtype:
    """Of the frozen weights: as --dtype says, else half precision where a GPU trains in it, float32 on a CPU."""
    if recipe.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[recipe.dtype]
    if train_device(train).type != "cuda":
        return torch.float32
    if train.get("bf16"):
        return torch.bfloat16
    return torch.float16 if train.get("fp16") else torch.float32


def trained_dtype(args: TrainingArguments) -> torch.dtype:
    """Of the weights that train: float32, as Adam's steps are lost in half precision.

    DeepSpeed in half precision keeps such copies itself, and does not autocast: all weights are in its precision then.
    """
    if args.deepspeed and args.hf_deepspeed_config.is_true("bf16.enabled"):
        return torch.bfloat16
    return torch.float16 if args.deepspeed and args.hf_deepspeed_config.is_true("fp16.enabled") else torch.float32


def load_device(args: TrainingArguments) -> torch.device:
    """Where the model is loaded and decomposed: the device it trains on, unless it is to be sharded from the CPU."""
    return torch.device("cpu") if args.deepspeed or args.fsdp else args.device


def _may_be_unused(modules: str) -> bool:
    return "vision" in modules or "*" in modules.removesuffix(".*")


def _evaluation(train: dict[str, Any], recipe: Recipe) -> None:
    if recipe.data.eval_path is None:
        if train.get("eval_strategy", "no") != "no":
            raise UserError(
                f"train.eval_strategy: {train['eval_strategy']} needs held-out records\n"
                "name them with data.eval_path or --eval_data_path"
            )
    elif "eval_strategy" not in train:
        # The best model is chosen among checkpoints: each of them needs its evaluation.
        by_steps = train.get("load_best_model_at_end") and train.get("save_strategy", "steps") == "steps"
        train["eval_strategy"] = "steps" if by_steps else "epoch"
        if by_steps:
            train.setdefault("eval_steps", train.get("save_steps", 500))
