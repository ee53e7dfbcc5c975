"""The `train:` section: names and values of HF's TrainingArguments, DeepSpeed and FSDP2, and what a run derives."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import accelerate
import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.utils import is_accelerate_available

import llava_recipes
from milora_vl.common.cli.console import did_you_mean, suggest
from milora_vl.common.compat.transformers import unstarted_arguments, use_one_gpu
from milora_vl.common.errors import Key, UserError
from milora_vl.common.strict_models import EXPECTED
from milora_vl.core.policy import Target
from milora_vl.core.policy.rules import DEFAULT_RULES
from milora_vl.models.base import Base
from milora_vl.models.devices import train_device

if TYPE_CHECKING:
    from milora_vl.train.recipe import Recipe

# Older name -> newest name. A recipe holds the newest; `keywords` gives an older transformers the older.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "warmup_ratio": "warmup_steps",
    "group_by_length": "train_sampling_strategy",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "torchdynamo": "torch_compile_backend",
}
SWITCHES = ("group_by_length", "overwrite_output_dir", "save_safetensors")  # of transformers 4
NOT_FLAGS = ("_n_gpu", "parallelism_config")  # an internal counter; a Python object
REFUSED = {
    "overwrite_output_dir": "a run never overwrites files: use another --output_dir, or --resume_from_checkpoint",
    "local_rank": None,  # old launchers pass it; torch reads the environment
    "save_safetensors": None,  # always on
    "resume_from_checkpoint": "is a flag of the command, not of the recipe",
    "output_dir": "is a flag of the command, not of the recipe",
    "label_smoothing_factor": "is not supported: the loss is the plain cross-entropy of the supervised tokens",
}
# Where Hugging Face's help does not describe what this command does.
HELP = {
    "label_smoothing_factor": "refused: the loss is the plain cross-entropy of the supervised tokens",
    "overwrite_output_dir": f"refused: {REFUSED['overwrite_output_dir']}",
    "save_safetensors": "no effect: always on",
    "learning_rate": "learning rate of adapter rules and of rules without one [2e-4; 2e-5 for modules in full]",
    "gradient_checkpointing": "save memory for about half more time [False]",
    "deepspeed": "zero2, zero3, zero3_offload, or a JSON file",
    "fsdp": "shard the model with FSDP2: full_shard [default of the bare flag] or shard_grad_op",
    "fsdp_config": "settings of FSDP2: a JSON object or file with reshard_after_forward, transformer_layer_cls_to_wrap",
    "logging_steps": "log the loss every N steps [10]",
    "report_to": "tensorboard, wandb, trackio, ... [none]",
}
# The Trainer accepts other values, then fails during training or ignores them.
LIMITS: dict[str, Any] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), Field(ge=1)
    ),
    **dict.fromkeys(
        (
            "dataloader_num_workers",
            "warmup_steps",
            "eval_steps",
            "weight_decay",
            "max_grad_norm",
            "adam_epsilon",
            "seed",
            "data_seed",
        ),
        Field(ge=0),
    ),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps"), Field(gt=0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Field(ge=0, lt=1)),
}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "a list"}
LLAVA_FULL_RATE = 2e-5
# The collator needs every field of a record, our loss needs the labels, and the log must show a NaN.
FORCED = {
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "prediction_loss_only": True,
    "logging_nan_inf_filter": False,
}
# Flags of example scripts without effect: the command trains, and evaluates if the recipe has held-out records.
NO_EFFECT = ("do_eval", "do_predict", "batch_eval_metrics", "include_for_metrics")
# What depends on the processes and the device of the run: a plan is made on any machine.
OF_THE_MACHINE = (
    "deepspeed", "fsdp", "fsdp_config", "use_cpu", "bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval",
    "push_to_hub", "hub_token",
)  # fmt: skip
# What every evaluation during a training measures, without `eval_`.
MEASURED = ("loss", "runtime", "samples_per_second", "steps_per_second")
# Autocast that belongs to the dtype of the frozen weights.
AUTOCAST = {"bfloat16": "bf16", "float16": "fp16"}
Strategy = Literal["full_shard", "shard_grad_op"]
# --fsdp: whether the weights of a layer are freed between its forward and its backward.
RESHARDS: dict[Strategy, bool] = {"full_shard": True, "shard_grad_op": False}
# Keys of fsdp_config that may be set. FSDP1 is not supported: it gives all weights of a layer one dtype, and an adapter
# in float32 beside a base in bfloat16 has two.
FSDP_KEYS = ("reshard_after_forward", "transformer_layer_cls_to_wrap", "auto_wrap_policy", "min_num_params")
ERRORS = (ValueError, TypeError, KeyError, ImportError, NotImplementedError, OSError)


@dataclass(frozen=True, slots=True)
class Argument:
    hint: Any
    default: Any
    choices: tuple[str, ...]
    help: str

    @property
    def members(self) -> set[Any]:
        return {getattr(kind, "__origin__", kind) for kind in get_args(self.hint) or (self.hint,)} - {NoneType}

    @property
    def is_switch(self) -> bool:
        return self.members == {bool}

    @property
    def is_list(self) -> bool:
        return list in self.members


@cache
def known() -> Mapping[str, Argument]:
    """Return all arguments of the installed transformers by name, also by the names of older and newer versions."""
    hints, found = get_type_hints(TrainingArguments), dict[str, Argument]()
    for field in dataclasses.fields(TrainingArguments):
        if not field.init or field.name in NOT_FLAGS:
            continue
        hint = hints[field.name]
        kinds = [kind for kind in get_args(hint) or (hint,) if isinstance(kind, type) and issubclass(kind, Enum)]
        choices = [member.value for kind in kinds for member in kind] or field.metadata.get("choices") or ()
        default = None if field.default is dataclasses.MISSING else field.default
        default = default.value if isinstance(default, Enum) else default
        text = " ".join(str(field.metadata.get("help", field.name)).replace("%%", "%").split())
        text = text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."
        found[field.name] = Argument(hint, default, tuple(choices), HELP.get(field.name, f"{text} [{default}]"))
    for old, new in RENAMED.items():
        other = found.get(new) or found[old]
        found.setdefault(old, replace(other, help=f"older name of {new}"))
        found.setdefault(new, other)
    for name in SWITCHES:
        found[name] = Argument(bool, None, (), HELP.get(name, f"older name of {RENAMED.get(name)}"))
    return found


def value_of(train: Mapping[str, Any], name: str) -> Any:
    """Return a training argument, or Hugging Face's default.

    >>> value_of({"seed": 7}, "seed"), value_of({}, "per_device_train_batch_size")
    (7, 8)
    """
    value = train.get(name)
    return known()[name].default if value is None else value


def default_rate(train: Mapping[str, Any], method: str | None) -> float:
    """Return the learning rate of a rule that sets none: the run's, else that of the default policy or of LLaVA."""
    rate = train.get("learning_rate")
    default = LLAVA_FULL_RATE if method == "full" else DEFAULT_RULES[0]["learning_rate"]
    return float(default if rate is None else rate)


def boolean(text: str) -> bool:
    return TypeAdapter(bool).validate_python(text)


def coerce(name: str, value: Any) -> Any:
    """Return the value of an argument, from YAML or the command line, in its type.

    Raises ValueError with what is expected. Hugging Face checks the rest.
    """
    argument = known()[name]
    members = argument.members
    if value is None or value == "None":
        return None
    if value in ("", [""]) and name in ("debug", "report_to", "lr_scheduler_kwargs"):  # a variable that is not set
        return argument.default
    if name == "fsdp" and str(value).lower() in ("", "false", "no", "0", "off"):
        return None
    if name == "debug" and isinstance(value, list):  # Hugging Face takes several names in one text
        value = " ".join(value)
    if name in ("log_level", "log_level_replica") and isinstance(value, str):
        value = value.lower()
    if isinstance(value, bool) and bool not in members and str in members:  # YAML 1.1 reads a bare `no` as false
        value = "yes" if value else "no"
    if dict in members and isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"expected JSON text, got {value!r}") from None
    expected = " or ".join(KINDS.get(kind, "a mapping or JSON text") for kind in KINDS | {dict: ""} if kind in members)
    if (isinstance(value, bool) and bool not in members) or (
        isinstance(value, list | dict) and type(value) not in members
    ):
        raise ValueError(f"expected {expected}, got {value!r}")
    hint: Any = Annotated[argument.hint, LIMITS[name]] if name in LIMITS else argument.hint
    try:
        valid = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]
        limit = EXPECTED[fault["type"]] if fault["type"].startswith(("greater", "less")) else expected
        raise ValueError(f"expected {limit.format(**fault.get('ctx', {}))}, got {value!r}") from None
    value = value if isinstance(value, int) and members == {float} else valid  # a recipe keeps its 500
    if name == "max_steps" and value < 1 and value != -1:
        raise ValueError(f"expected a number of at least 1, or -1 to train by epochs, got {value!r}")
    if argument.choices and isinstance(value, str) and value not in argument.choices:
        near = did_you_mean(suggest(value, argument.choices)[:1])
        raise ValueError(
            "\n".join(filter(None, (f"got {value!r}, expected one of {', '.join(argument.choices)}", near)))
        )
    return value


def canonical(name: str, value: Any) -> tuple[str, Any] | None:
    """Return the newest name and value of an argument; None if it has no effect any more.

    >>> canonical("warmup_ratio", 0.03), canonical("group_by_length", True)
    (('warmup_steps', 0.03), ('train_sampling_strategy', 'group_by_length'))
    """
    if name == "group_by_length":
        return "train_sampling_strategy", "group_by_length" if value else "random"
    if name in REFUSED and (REFUSED[name] is None or not value):
        return None
    return RENAMED.get(name, name), value


def keywords(train: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    older = {new: old for old, new in RENAMED.items() if old in fields}
    return {name if name in fields else older[name]: value for name, value in train.items()}


@dataclass(frozen=True, slots=True)
class Launch:
    deepspeed: dict[str, Any] | None = None
    fsdp: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def zero_stage(self) -> int:
        return int((self.deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def read_launch(train: Mapping[str, Any]) -> Launch:
    """Return the launcher settings of a `train:` section, read from files where it names them."""
    if train.get("fsdp"):
        _require_fsdp_alone(train)
        return Launch(fsdp=fsdp_settings(train["fsdp"], train.get("fsdp_config")))
    if train.get("fsdp_config"):
        where = Key.of("train.fsdp_config")
        raise UserError("no effect without --fsdp", code="launch-fsdp", where=where, hint="add --fsdp, or remove it")
    for name, flag in (("FSDP", "fsdp"), ("DEEPSPEED", "deepspeed")):
        is_on = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes")
        if is_on and not train.get("deepspeed"):
            raise UserError(
                f"accelerate has settings of {name}, which differ from those of this command",
                code=f"launch-accelerate-{flag}",
                hint=f"pass --{flag} to this command\n"
                "and let accelerate only start the processes: distributed_type: MULTI_GPU",
            )
    if not train.get("deepspeed"):
        return Launch()
    return _complete_deepspeed(_read_deepspeed(train["deepspeed"]))


def _read_deepspeed(config: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(config, str) and config in llava_recipes.names("deepspeed"):
        packaged: Mapping[str, Any] = json.loads(llava_recipes.read(config, "deepspeed"))
        return packaged
    if isinstance(config, str) and not Path(config).is_file():
        near = suggest(Path(config).stem, llava_recipes.names("deepspeed"))
        message = f"expected {', '.join(llava_recipes.names('deepspeed'))} or a JSON file, got {config}"
        hint = did_you_mean(near[:1]) or "name one of these, or a file that exists"
        raise UserError(message, where=Key.of("train.deepspeed"), hint=hint)
    return _read_object(config, "deepspeed")


def _read_object(config: Mapping[str, Any] | str, key: str) -> Mapping[str, Any]:
    content: Any = config
    if isinstance(config, str):
        try:
            content = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            content = error
    if not isinstance(content, Mapping):
        message = f"expected a JSON object or the name of a file with one, got {config!r}: {content}"
        hint = "correct the file or the value"
        raise UserError(message, where=Key(("train", key)), hint=hint)
    return content


def _complete_deepspeed(content: Mapping[str, Any]) -> Launch:
    """Return the settings as a run needs them, with warnings about changes.

    Rules of the policy set learning rates, so the Trainer builds optimizer and schedule; DeepSpeed's optimizer would
    silently use one rate for all.
    """
    settings, warnings = deepcopy(dict(content)), []
    for block, flags in {"optimizer": "--optim and the policy", "scheduler": "--lr_scheduler_type"}.items():
        if settings.pop(block, None) is not None:
            warnings.append(f"deepspeed: its {block} has no effect; use {flags}")
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)  # without it the saved files are unusable
    settings.setdefault("zero_force_ds_cpu_optimizer", False)  # that optimizer would need a compiler
    return Launch(deepspeed=settings, warnings=tuple(warnings))


def fsdp_settings(strategy: str, config: Mapping[str, Any] | str | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"version": 2, "reshard_after_forward": RESHARDS[_strategy(strategy)]}
    for name, value in _read_object(config or {}, "fsdp_config").items():
        key = str(name).removeprefix("fsdp_")
        if (key, str(value)) != ("version", "2") and key not in FSDP_KEYS:
            raise _fsdp_error(f"unknown or unsupported setting {name}: {value}", f"known keys: {', '.join(FSDP_KEYS)}")
        settings[key] = value
    return settings


def strategy_of(settings: Mapping[str, Any]) -> Strategy:
    return "full_shard" if str(settings["reshard_after_forward"]).lower() == "true" else "shard_grad_op"


def _strategy(value: str | bool) -> Strategy:
    words = [word for word in str(value).replace(",", " ").split() if word != "auto_wrap"]
    if words and words[0].lower() in ("yes", "true", "1"):
        words[0] = "full_shard"
    for strategy in RESHARDS:
        if words == [strategy]:
            return strategy
    raise _fsdp_error(f"expected {' or '.join(RESHARDS)}, got {value!r}", "use  --fsdp full_shard")


def _require_fsdp_alone(train: Mapping[str, Any]) -> None:
    refused = {
        "deepspeed": "use one of both",
        "fp16": "use --bf16",
        "torch_compile": "train without --torch_compile",
    }
    for name, hint in refused.items():
        if train.get(name):
            raise _fsdp_error(f"does not work together with --{name}", hint)
    if train.get("bf16") and not is_accelerate_available("1.13.0"):
        message = f"accelerate {accelerate.__version__} would hold the frozen base in float32 under FSDP2 with --bf16"
        raise _fsdp_error(message, "pip install 'accelerate>=1.13', or use --deepspeed zero3")


def _fsdp_error(message: str, hint: str) -> UserError:
    return UserError(message, code="launch-fsdp", where=Key.of("train.fsdp"), hint=hint)


def require_processes_for_fsdp(train: Mapping[str, Any]) -> None:
    if train.get("fsdp") and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise _fsdp_error(
            "needs several processes, and this is one", "start it with  torchrun --nproc_per_node N -m milora_vl.train"
        )


@dataclass(frozen=True, slots=True)
class Derived:
    """The `train:` section with derived values, as keywords of TrainingArguments by their newest names."""

    train: dict[str, Any]
    compiled: dict[str, str] | None  # arguments of torch.compile for the blocks of the language tower
    warnings: tuple[str, ...]


def derive(recipe: Recipe, base: Base, targets: Sequence[Target], launch: Launch) -> Derived:
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
    device = train_device(train)
    if device.type == "cpu":
        train.setdefault("use_cpu", True)  # HF rejects bf16 on a CPU without this
    # A batch of LLaVA without images holds a placeholder image, so all trained parameters are used, except layers of
    # the vision tower that LLaVA does not read. Batches of other families hold none.
    trains_tower = any(target.tower == "vision" for target in targets)
    train.setdefault("ddp_find_unused_parameters", trains_tower or base.own_pictures)
    train.setdefault("dataloader_pin_memory", device.type not in ("cpu", "mps"))
    if train["dataloader_pin_memory"]:
        train.setdefault("accelerator_config", {"non_blocking": True})  # batches move while the GPU computes
    if device.type != "cuda" and train.pop("tf32", None):
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
    # HF would compile the whole model, without our loss.
    is_compiled = train.pop("torch_compile", False)
    named = {name: train.pop(f"torch_compile_{name}", None) for name in ("backend", "mode")}
    options = {name: value for name, value in named.items() if value is not None}
    return Derived(train, options if is_compiled or options else None, tuple(warnings))


def check(recipe: Recipe, targets: Sequence[Target], derived: Derived, launch: Launch) -> None:
    """Raise UserError for arguments that neither Hugging Face nor we support with these rules and data."""
    train, is_quantized = derived.train, recipe.quantization != "none"
    autocast = AUTOCAST.get(recipe.dtype)
    in_full = any(target.method == "full" for target in targets)
    metric = str(train.get("metric_for_best_model") or "loss").removeprefix("eval_")
    uses_metric = (
        train.get("load_best_model_at_end"),
        train.get("save_strategy") == "best",
        train.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"),
    )
    is_measured = metric in MEASURED or (metric.startswith("suite_") and recipe.eval.suite_every)
    has_evaluation = value_of(train, "eval_strategy") != "no" or train.get("save_strategy") == "best"
    of_evaluation = "save_strategy" if train.get("save_strategy") == "best" else "eval_strategy"
    optimizer = str(train.get("optim") or "")
    for is_wrong, key, message, hint in (
        (
            optimizer.startswith(("galore", "apollo", "lomo", "adalomo")),
            "train.optim",
            f"{optimizer} makes its own parameter groups, so it does not support learning rates per rule",
            "use --optim adamw_torch",
        ),
        (
            derived.compiled is not None and launch.zero_stage == 3,
            "train.torch_compile",
            "ZeRO-3 gathers weights in hooks, which torch.compile can't trace",
            "use --deepspeed zero2",
        ),
        (
            is_quantized and (launch.zero_stage == 3 or launch.fsdp is not None),
            "quantization",
            f"{'ZeRO-3' if launch.fsdp is None else 'FSDP2'} cannot shard a quantised base",
            "use --deepspeed zero2, as LLaVA's finetune_qlora.sh does",
        ),
        (  # What trains is float32, and only autocast multiplies it with a half-precision base.
            autocast is not None and not train.get(autocast, True) and in_full and launch.deepspeed is None,
            f"train.{autocast}",
            f"dtype {recipe.dtype} with {autocast} off: a module that trains in full is float32 and does not fit the "
            "base's precision",
            f"leave --{autocast} out, or use --dtype float32",
        ),
        (
            recipe.data.eval_path is None and has_evaluation,
            f"train.{of_evaluation}",
            f"{train.get(of_evaluation)} needs held-out records",
            "set data.eval_path or --eval_data_path",
        ),
        (
            any(uses_metric) and not is_measured,
            "train.metric_for_best_model",
            f"{metric} is not measured during a training",
            "use loss, or  suite_BENCHMARK  with --eval_suite_every N",
        ),
    ):
        if is_wrong:
            raise UserError(message, code="train-arguments", where=Key.of(key), hint=hint)


def build(train: Mapping[str, Any], output_dir: Path, *, is_started: bool) -> TrainingArguments:
    """Return Hugging Face's arguments of this process. Raises UserError for what Hugging Face refuses.

    A plan does not start processes and writes nothing: without `is_started`, no device is looked for.
    """
    train = deepcopy(dict(train))  # HF writes into the settings of DeepSpeed
    if not is_started:
        train = {name: value for name, value in train.items() if name not in OF_THE_MACHINE} | {"use_cpu": True}
    with nullcontext() if is_started else _environment_kept(), refused():
        if is_started:
            _prepare_processes(train)
        make = TrainingArguments if is_started else unstarted_arguments
        args = make(output_dir=str(output_dir), **keywords(train))
        if is_started:
            _start_deepspeed(train)
        with nullcontext() if is_started else suppress(ImportError):  # a plan says which package is missing
            Trainer.get_optimizer_cls_and_kwargs(args)
        weight = torch.zeros(1, requires_grad=True)
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([weight], lr=float(value_of(train, "learning_rate"))),  # `lr_end` is compared with it
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=train.get("lr_scheduler_kwargs") or {},
        )
    if is_started and args.n_gpu > 1:
        use_one_gpu(args)
    return args


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


@contextmanager
def refused(kinds: tuple[type[Exception], ...] = ERRORS) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        message = f"transformers refuses these arguments: {' '.join(str(error).split())[:300]}"
        hint = "python -m milora_vl.train --help  lists all flags"
        raise UserError(message, code="train-arguments", where=Key.of("train"), hint=hint) from None


def zero_stage(args: TrainingArguments) -> int:
    return int(args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)) if args.deepspeed else 0


def trained_dtype(args: TrainingArguments) -> torch.dtype:
    """Return the dtype of trained weights: float32, because half precision loses the steps of Adam.

    DeepSpeed in half precision keeps float32 copies and does not autocast, so all weights use its precision.
    """
    if args.deepspeed and args.hf_deepspeed_config.is_true("bf16.enabled"):
        return torch.bfloat16
    return torch.float16 if args.deepspeed and args.hf_deepspeed_config.is_true("fp16.enabled") else torch.float32


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
    return str(base_dtype(recipe)).removeprefix("torch.")


def _prepare_processes(train: Mapping[str, Any]) -> None:
    """Prepare what TrainingArguments initializes: the variables of DeepSpeed, and the timeout of processes on CPUs.

    Without a launcher DeepSpeed would look for MPI. On CPUs Hugging Face ignores `--ddp_timeout`.
    """
    if train.get("use_cpu"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if train.get("ddp_timeout") and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            timeout = timedelta(seconds=train["ddp_timeout"])
            dist.init_process_group(train.get("ddp_backend") or "gloo", timeout=timeout)
    if train.get("deepspeed") and "WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        for name, value in {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            os.environ.setdefault(name, value)


def _start_deepspeed(train: Mapping[str, Any]) -> None:
    """Initialize DeepSpeed in the process group of TrainingArguments: HF skips that on CPUs, and ZeRO-3 needs it."""
    if train.get("deepspeed"):
        import deepspeed

        if train.get("use_cpu"):
            # DeepSpeed would compile an inference kernel. If it is killed while compiling, it leaves a stale lock file
            # that blocks later runs.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
