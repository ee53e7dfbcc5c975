"""The table of Hugging Face's training flags: types, old names, value ranges, conversion; imports no transformers.

tests/reference/make_hf_flags.py writes `hf_flags.json`, from the newest supported version. A recipe holds its names;
`for_installed` leaves out what an older TrainingArguments does not take.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from milora_vl.common.cli.command_line import did_you_mean, suggest

TRUE, FALSE = ("true", "t", "yes", "y", "1", "on"), ("false", "f", "no", "n", "0", "off")
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
# Names of transformers 4 that scripts still use, with their types.
OLDER = {
    "evaluation_strategy": "str", "group_by_length": "bool", "no_cuda": "bool", "overwrite_output_dir": "bool",
    "per_gpu_eval_batch_size": "int", "per_gpu_train_batch_size": "int", "push_to_hub_model_id": "str",
    "push_to_hub_token": "str", "save_safetensors": "bool", "torchdynamo": "str", "warmup_ratio": "float",
}  # fmt: skip
REFUSED = {
    "overwrite_output_dir": "a run never overwrites files: use another --output_dir, or --resume_from_checkpoint",
    "local_rank": None,  # old launchers pass it; torch reads the environment
    "save_safetensors": None,  # always on
    "resume_from_checkpoint": "is a flag of the command, not of the recipe",
    "output_dir": "is a flag of the command, not of the recipe",
    "label_smoothing_factor": "is not supported: the loss is the plain cross-entropy of the supervised tokens",
}
# Hugging Face's help texts of these flags do not describe what this command does.
HELP = {
    "label_smoothing_factor": "refused: the loss is the plain cross-entropy of the supervised tokens",
    "overwrite_output_dir": f"refused: {REFUSED['overwrite_output_dir']}",
    "save_safetensors": "no effect: always on",
    "fsdp_config": "settings of FSDP2: a JSON object or file with reshard_after_forward, transformer_layer_cls_to_wrap",
}
# Values of flags that Hugging Face checks only when a training starts.
CHOICES = {
    **dict.fromkeys(
        ("log_level", "log_level_replica"), ("debug", "info", "warning", "error", "critical", "passive", "detail")
    ),
    "debug": ("underflow_overflow", "tpu_metrics_debug"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
EMPTY_IS_UNSET = ("debug", "report_to", "lr_scheduler_kwargs")
# Mappings that may be the name of a file, too.
FILES = ("deepspeed", "fsdp_config", "accelerator_config")
# The Trainer accepts smaller values, then fails during training or ignores them.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "warmup_steps": 0,
    "warmup_ratio": 0,
    "eval_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "seed": 0,
    "data_seed": 0,
}
# The Trainer fails at logging_steps 0, and never saves at save_steps 0.
ABOVE_0 = {
    "logging_steps": "for no log lines:  --logging_strategy no",
    "save_steps": "for no checkpoints:  --save_strategy no",
}


class WrongValue(ValueError):
    """A value that a flag does not take: what is wrong, and a hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Flag:
    """One field of TrainingArguments."""

    name: str
    type: str
    choices: tuple[str, ...]
    default: Any
    help: str


@cache
def flags() -> Mapping[str, Flag]:
    """Return all flags by name, also of older scripts."""
    text = resources.files("milora_vl.train.recipe").joinpath("hf_flags.json").read_text(encoding="utf-8")
    known = {
        name: Flag(name, f["type"], tuple(f["choices"]), f["default"], f["help"])
        for name, f in json.loads(text).items()
    }
    for name, type_ in OLDER.items():
        choices = known["eval_strategy"].choices if name == "evaluation_strategy" else ()
        known[name] = Flag(name, type_, choices, None, f"older name of {RENAMED.get(name, name)}")
    return known


def value_of(train: Mapping[str, Any], name: str) -> Any:
    """Return a training argument, or Hugging Face's default.

    >>> value_of({"seed": 7}, "seed"), value_of({}, "per_device_train_batch_size")
    (7, 8)
    """
    value = train.get(name)
    return flags()[name].default if value is None else value


def boolean(text: str) -> bool:
    """Return the value of `True`, `yes`, `1`, ... as HF's parser does. Raises ValueError for any other text."""
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError(f"expected true or false, got {text!r}")


def coerce(name: str, value: Any) -> Any:
    """Return the value of flag `name`, from YAML or the command line, in the type of the flag.

    Raises WrongValue, with what is expected, for an invalid value.
    """
    flag = flags()[name]
    if value is None or (isinstance(value, str) and value == "None"):
        return None
    if value in ("", [""]) and name in EMPTY_IS_UNSET:  # as scripts write a variable that is not set
        return flag.default
    if name == "debug":  # Hugging Face takes several names in one text
        value = " ".join(value if isinstance(value, list) else [str(value)]).split()
    if name in ("log_level", "log_level_replica") and isinstance(value, str):
        value = value.lower()
    if isinstance(value, bool) and flag.type == "str":  # YAML 1.1 reads a bare `no` as false
        value = "yes" if value else "no"
    if name == "fsdp" and str(value).lower() in ("", *FALSE):
        return None
    try:
        converted = CONVERT[flag.type](value)
    except (ValueError, TypeError, OverflowError):
        raise WrongValue(f"expected {EXPECTED[flag.type]}, got {value!r}") from None
    choices = flag.choices or CHOICES.get(name, ())
    for one in (converted if flag.type == "list" else [converted]) if choices else ():
        if one not in choices:
            near = did_you_mean(suggest(str(one), choices)[:1])
            raise WrongValue(f"got {one!r}, expected one of {', '.join(choices)}", near)
    if flag.type == "dict" and isinstance(converted, str) and name not in FILES:
        raise WrongValue(f"expected a mapping or JSON text, got {value!r}", 'for example  {"key": 1}')
    if name in ABOVE_0 and converted <= 0:
        raise WrongValue(f"must be above 0, got {value!r}", ABOVE_0[name])
    if (wrong := _out_of_range(name, converted)) is not None:
        raise WrongValue(f"{wrong}, got {value!r}")
    return converted


def canonical(name: str, value: Any) -> tuple[str, Any] | None:
    """Return the newest name and value of a flag; None if the flag has no effect any more.

    >>> canonical("warmup_ratio", 0.03), canonical("group_by_length", True)
    (('warmup_steps', 0.03), ('train_sampling_strategy', 'group_by_length'))
    """
    if name == "group_by_length":
        return "train_sampling_strategy", "group_by_length" if value else "random"
    if name == "warmup_ratio" and not value:
        return None
    if name in REFUSED and (REFUSED[name] is None or not value):
        return None
    return RENAMED.get(name, name), value


def replaced(flags: Mapping[str, Any]) -> set[str]:
    """Return the newest names of the arguments that `flags` set by an older one.

    >>> replaced({"warmup_ratio": 0.1, "max_steps": 9})
    {'warmup_steps'}
    """
    return {RENAMED[name] for name in flags if name in RENAMED}


def for_installed(train: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return keyword arguments for TrainingArguments with these `fields`, and the unsupported names.

    Unsupported names with their default value are dropped and not returned.
    """
    older = {name: f"gradient_{name.removeprefix('activation_')}" for name in train if name.startswith("activation_")}
    out = {name if name in fields else older.get(name, name): value for name, value in train.items()}
    absent = sorted(name for name in out if name not in fields)
    unsupported = [name for name in absent if out[name] != flags()[name].default]
    return {name: value for name, value in out.items() if name in fields}, unsupported


def _out_of_range(name: str, number: Any) -> str | None:
    if name in AT_LEAST and number < AT_LEAST[name]:
        return f"must be at least {AT_LEAST[name]}"
    if name == "num_train_epochs" and number <= 0:
        return "must be above 0"
    if name == "max_steps" and number < 1 and number != -1:
        return "must be at least 1, or -1 to train by epochs"
    if name in ("adam_beta1", "adam_beta2") and number >= 1:
        return "must be below 1"
    if name == "warmup_ratio" and number > 1:
        return "must be at most 1; it is a share of all steps"
    return None


def _dict(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return json.loads(value)
    if isinstance(value, (str, dict)):
        return value
    raise TypeError


def _number(value: Any) -> float:
    if isinstance(value, bool) or math.isnan(float(value)):
        raise TypeError
    return float(value)


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _text(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise TypeError
    return str(value)


CONVERT: dict[str, Callable[[Any], Any]] = {
    "bool": lambda v: v if isinstance(v, bool) else boolean(str(v)),
    "int": _whole,
    "float": lambda v: v if isinstance(v, int) and not isinstance(v, bool) else _number(v),
    "str": _text,
    "list": lambda v: list(v) if isinstance(v, (list, tuple)) else [str(v)],
    "dict": _dict,
}
EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a word",
    "list": "a list",
    "dict": "a mapping, JSON text or a file",
}
