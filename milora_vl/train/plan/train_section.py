"""The `train:` section as HF's TrainingArguments take it: derived and refused values; optimizer, scheduler."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from milora_vl.common.compat.transformers import unstarted_arguments
from milora_vl.common.errors import Key, Problem, UserError, first_line
from milora_vl.core.policy import Target
from milora_vl.models.base import Base
from milora_vl.models.devices import train_device
from milora_vl.train.plan.launch import Launch
from milora_vl.train.recipe import hf_flags
from milora_vl.train.recipe.hf_flags import value_of
from milora_vl.train.recipe.schema import Recipe

# The collator needs every field of a record, our loss needs the labels, and the log must show a NaN.
FORCED = {
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "prediction_loss_only": True,
    "logging_nan_inf_filter": False,
}
# Optimizers that select parameters by module names.
OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo")
# Flags of example scripts without effect: the command trains, and evaluates if the recipe has held-out records.
NO_EFFECT = ("do_eval", "do_predict", "batch_eval_metrics", "include_for_metrics")
# What depends on the processes and the device of the run: a plan is made on any machine.
OF_THE_MACHINE = (
    "deepspeed", "fsdp", "fsdp_config", "use_cpu", "bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "push_to_hub", "hub_token",
)  # fmt: skip
# What every evaluation during a training measures, without `eval_`.
MEASURED = ("loss", "runtime", "samples_per_second", "steps_per_second")
# Autocast that belongs to the dtype of the frozen weights.
AUTOCAST = {"bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class TrainSection:
    """The `train:` section with derived values, as keywords of TrainingArguments by their newest names."""

    arguments: dict[str, Any]
    launch: Launch
    warnings: tuple[str, ...]
    compiled: dict[str, str] | None  # arguments of torch.compile for the blocks of the language tower


def derive(recipe: Recipe, base: Base, targets: Sequence[Target], launch: Launch) -> TrainSection:
    """Return the arguments of a run: what it always sets, and what follows from the model, the rules and the device."""
    train, warnings = dict(recipe.train), list(launch.warnings)
    for name, value in FORCED.items():
        if train.get(name, value) != value:
            warnings.append(f"train.{name}: {train[name]} has no effect; it is always {value}")
        train[name] = value
    unused = [name for name in NO_EFFECT if train.pop(name, None)]
    if unused:
        warnings.append(f"no effect: {', '.join(unused)}")
    if train.get("train_sampling_strategy") == "group_by_length":
        del train["train_sampling_strategy"]  # our sampler does this; HF's sampler needs tokenized records
    if launch.deepspeed is not None:
        train["deepspeed"] = launch.deepspeed
    if launch.fsdp is not None:
        train |= {"fsdp": True, "fsdp_config": launch.fsdp}
    if autocast := AUTOCAST.get(recipe.dtype):
        train.setdefault(autocast, True)
    if train_device(train).type == "cpu":
        train.setdefault("use_cpu", True)  # HF rejects bf16 on a CPU without this
    # A batch of LLaVA without images holds a placeholder image, so all trained parameters are used, except layers of
    # the vision tower that LLaVA does not read. Batches of other families hold none.
    trains_tower = any(target.tower == "vision" for target in targets)
    train.setdefault("ddp_find_unused_parameters", trains_tower or base.own_pictures)
    device = train_device(train).type
    train.setdefault("dataloader_pin_memory", device not in ("cpu", "mps"))
    if train["dataloader_pin_memory"]:
        train.setdefault("accelerator_config", {"non_blocking": True})  # batches move while the GPU computes
    if device != "cuda" and train.pop("tf32", None):
        warnings.append("train.tf32 has no effect on a CPU")
    if train.get("save_strategy") == "best":
        train.setdefault("metric_for_best_model", "loss")
    if recipe.data.eval_path is not None and "eval_strategy" not in train:
        # load_best_model_at_end compares checkpoints, so each of them needs an evaluation.
        by_steps = train.get("load_best_model_at_end") and value_of(train, "save_strategy") == "steps"
        train["eval_strategy"] = "steps" if by_steps else "epoch"
        if by_steps:
            train.setdefault("eval_steps", value_of(train, "save_steps"))
    if train.get("use_liger_kernel"):
        # Liger's fused loss would replace the forward that computes our loss in chunks. Its other kernels stay.
        kernels = train.get("liger_kernel_config") or {}
        if kernels.get("fused_linear_cross_entropy"):
            warnings.append("train.liger_kernel_config: fused_linear_cross_entropy has no effect; it is always off")
        train["liger_kernel_config"] = {**kernels, "fused_linear_cross_entropy": False}
    return TrainSection(train, launch, tuple(warnings), _compiled(train))


def _compiled(train: dict[str, Any]) -> dict[str, str] | None:
    """Take the settings of torch.compile out of the arguments: HF would compile the whole model, without our loss."""
    is_on = train.pop("torch_compile", False)
    named = {name: train.pop(f"torch_compile_{name}", None) for name in ("backend", "mode")}
    options = {name: value for name, value in named.items() if value is not None}
    return options if is_on or options else None


def conflicts(recipe: Recipe, targets: Sequence[Target], section: TrainSection) -> list[Problem]:
    """Return the problems of arguments that do not go with the model, the rules or the data of the run."""
    train, launch, found = section.arguments, section.launch, list[Problem]()
    optimizer = str(train.get("optim") or "")
    if optimizer.startswith(OWN_GROUPS):
        message = f"{optimizer} makes its own parameter groups, so it does not support learning rates per rule"
        found.append(Problem(message, "optimizer-unsupported", Key.of("train.optim"), "use --optim adamw_torch"))
    if (train.get("activation_checkpointing_kwargs") or {}).get("offload") and train_device(train).type == "cpu":
        message = "offload moves activations from a GPU to the CPU, and this run is on a CPU"
        key = Key.of("train.activation_checkpointing_kwargs")
        found.append(Problem(message, "offload-no-gpu", key, "leave offload out"))
    if section.compiled is not None and launch.zero_stage == 3:
        message = "ZeRO-3 gathers weights in hooks, which torch.compile can't trace"
        found.append(Problem(message, "compile-zero3", Key.of("train.torch_compile"), "use --deepspeed zero2"))
    if recipe.quantization != "none" and launch.zero_stage == 3:
        hint = "use --deepspeed zero2, as LLaVA's finetune_qlora.sh does"
        message = "ZeRO-3 cannot shard a quantised base"
        found.append(Problem(message, "quantization-zero3", Key.of("quantization"), hint))
    if recipe.quantization != "none" and launch.fsdp is not None:
        hint = "start the processes without --fsdp (DDP), or use --deepspeed zero2"
        message = "FSDP2 does not shard a quantised base"
        found.append(Problem(message, "quantization-fsdp", Key.of("quantization"), hint))
    autocast = AUTOCAST.get(recipe.dtype)
    in_full = any(target.method == "full" for target in targets)
    if autocast and not train[autocast] and in_full and launch.deepspeed is None:
        # What trains is float32, and only autocast multiplies it with a half-precision base.
        message = (
            f"dtype {recipe.dtype} with {autocast} off: a module that trains in full is float32 and does not fit "
            "the base's precision"
        )
        hint = f"leave --{autocast} out, or use --dtype float32"
        found.append(Problem(message, "recipe-precision", Key(("train", autocast)), hint))
    if recipe.data.eval_path is None:
        hint = "set data.eval_path or --eval_data_path"
        if train.get("save_strategy") == "best":
            message = "the best checkpoint is chosen by held-out records"
            found.append(Problem(message, "eval-no-records", Key.of("train.save_strategy"), hint))
        if value_of(train, "eval_strategy") != "no":
            message = f"{train['eval_strategy']} needs held-out records"
            found.append(Problem(message, "eval-no-records", Key.of("train.eval_strategy"), hint))
    return found


def require_accepted(recipe: Recipe, section: TrainSection) -> None:
    """Raise UserError for settings that Hugging Face would refuse once a training starts: values, scheduler, optimizer.

    It starts no process and writes nothing.
    """
    train = section.arguments
    arguments, _ = hf_flags.for_installed(
        {name: value for name, value in train.items() if name not in OF_THE_MACHINE}, accepted_fields()
    )
    with _environment_kept():
        with refused(train):
            args = unstarted_arguments(output_dir="not-used", use_cpu=True, **arguments)
        _require_optimizer(args)
    weight = torch.zeros(1, requires_grad=True)
    with refused(train, "lr_scheduler_kwargs" if train.get("lr_scheduler_kwargs") else "lr_scheduler_type"):
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([weight], lr=float(value_of(train, "learning_rate"))),  # `lr_end` is compared with it
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=train.get("lr_scheduler_kwargs") or {},
        )
    _require_metric(train, recipe)


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Undo what the block changes in the environment: TrainingArguments sets variables for accelerate."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def accepted_fields() -> dict[str, Any]:
    """Return the fields of the installed TrainingArguments, by name."""
    return {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


@contextmanager
def refused(
    train: Mapping[str, Any],
    name: str = "",
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, KeyError, ImportError, NotImplementedError, OSError),
) -> Iterator[None]:
    """Turn errors of Hugging Face about training arguments into a UserError at the setting that the error names.

    `name` is the setting if the error names none.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        name = _named_in(str(error), train) or name
        raise UserError(
            " ".join(str(error).split())[:300],
            code="train-arguments",
            where=Key(("train", name) if name else ("train",)),
            hint=f"correct {name}, or leave it out" if name else "python -m milora_vl.train --help  lists all flags",
        ) from None


def _named_in(text: str, train: Mapping[str, Any]) -> str:
    """Return the setting that a text of Hugging Face names first: one that the user has set, else any."""
    lowered = text.lower()
    for names in (train, hf_flags.flags()):
        found = {}
        for name in names:
            spelled = re.search(rf"\b{name}\b|\b{name.replace('_', '')}\b", lowered)
            if spelled and "_" in name:  # short names such as `seed` are words of the text, too
                found[name] = spelled.start()
        if found:
            return min(found, key=lambda name: found[name])
    return ""


def _require_optimizer(args: TrainingArguments) -> None:
    """Raise UserError for an optimizer that the Trainer cannot create with these arguments."""
    name = OptimizerNames(args.optim).value
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{name}: {first_line(error)}",
            code="optimizer-unsupported",
            where=Key.of("train.optim"),
            hint="use --optim adamw_torch, or correct --optim_args KEY=VALUE,KEY=VALUE",
        ) from None


def _require_metric(train: Mapping[str, Any], recipe: Recipe) -> None:
    """Raise UserError for a metric of the best checkpoint that no evaluation of this run measures."""
    metric = str(train.get("metric_for_best_model") or "loss").removeprefix("eval_")
    uses = (
        train.get("load_best_model_at_end"),
        train.get("save_strategy") == "best",
        train.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"),
    )
    if any(uses) and metric not in MEASURED and not (metric.startswith("suite_") and recipe.eval.suite_every):
        raise UserError(
            f"{metric} is not measured during a training",
            code="metric-unknown",
            where=Key.of("train.metric_for_best_model"),
            hint="use loss, or  suite_BENCHMARK  with --eval_suite_every N",
        )


def base_dtype(recipe: Recipe) -> torch.dtype:
    """Return the dtype of the frozen weights: --dtype, else the half precision of a run on a GPU, else float32."""
    if recipe.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[recipe.dtype]
    if train_device(recipe.train).type in ("cpu", "mps"):
        return torch.float32
    if recipe.train.get("bf16"):
        return torch.bfloat16
    return torch.float16 if recipe.train.get("fp16") else torch.float32


def dtype_name(recipe: Recipe) -> str:
    """Return the name of the dtype of the frozen weights."""
    return str(base_dtype(recipe)).removeprefix("torch.")
