"""DeepSpeed, FSDP2 and launchers (torchrun, accelerate): their settings checked and completed, or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import llava_recipes
from milora_vl.common.cli.command_line import did_you_mean, suggest
from milora_vl.common.errors import Key, UserError

Strategy = Literal["full_shard", "shard_grad_op"]
# --fsdp: whether the weights of a layer are freed between its forward and its backward.
RESHARDS: dict[Strategy, bool] = {"full_shard": True, "shard_grad_op": False}
# Keys of fsdp_config that may be set, and keys that are refused unless they have this value.
FSDP_KEYS = ("reshard_after_forward", "transformer_layer_cls_to_wrap", "auto_wrap_policy", "min_num_params")
FSDP_VALUES: dict[str, tuple[Any, str]] = {
    "version": (2, "FSDP1 gives all weights of a layer one dtype, and an adapter in float32 beside a base in bfloat16 "
                   "has two"),
    "cpu_offload": (False, "use --deepspeed zero3_offload"),
    "activation_checkpointing": (False, "use --gradient_checkpointing, which keeps the names of the layers"),
    "cpu_ram_efficient_loading": (False, "every process loads the base, because it decomposes its layers"),
    "state_dict_type": ("FULL_STATE_DICT", "checkpoints have the format of one process"),
    "xla": (False, "TPUs are not supported"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """How processes share the model: the settings of DeepSpeed or of FSDP2, None without them."""

    deepspeed: dict[str, Any] | None = None
    fsdp: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def zero_stage(self) -> int:
        """Return the ZeRO stage, 0 without DeepSpeed."""
        return int((self.deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def read_launch(train: Mapping[str, Any]) -> Launch:
    """Return the launcher settings of a `train:` section, read from files where it names them.

    Raises UserError, before anything loads, for settings that are not supported.
    """
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
    """Return the DeepSpeed configuration of a packaged name (zero2, zero3, zero3_offload), a file or a mapping."""
    if isinstance(config, str) and config in llava_recipes.names("deepspeed"):
        packaged: Mapping[str, Any] = json.loads(llava_recipes.read(config, "deepspeed"))
        return packaged
    if isinstance(config, str) and not Path(config).is_file():
        near = suggest(Path(config).stem, llava_recipes.names("deepspeed"))
        raise UserError(
            f"expected {', '.join(llava_recipes.names('deepspeed'))} or a JSON file, got {config}",
            code="deepspeed-unknown",
            where=Key.of("train.deepspeed"),
            hint=did_you_mean(near[:1]) or "name one of these, or a file that exists",
        )
    return _read_object(config, "deepspeed")


def _read_object(config: Mapping[str, Any] | str, key: str) -> Mapping[str, Any]:
    """Return a mapping of settings, read from a JSON file where it names one. Raises UserError at the key."""
    content: Any = config
    if isinstance(config, str):
        try:
            content = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            content = error
    if not isinstance(content, Mapping):
        raise UserError(
            f"expected a JSON object or the name of a file with one, got {config!r}: {content}",
            code="launch-settings",
            where=Key(("train", key)),
            hint="correct the file or the value",
        )
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
    """Return Hugging Face's `fsdp_config` of FSDP2 for `--fsdp` and `--fsdp_config`, a mapping or a JSON file.

    Raises UserError for settings that are not supported.
    """
    settings: dict[str, Any] = {"version": 2, "reshard_after_forward": RESHARDS[_strategy(strategy)]}
    for name, value in _read_object(config or {}, "fsdp_config").items():
        key = str(name).removeprefix("fsdp_")
        if key in FSDP_VALUES and str(value).lower() != str(FSDP_VALUES[key][0]).lower():
            raise _fsdp_error(f"{name}: {value} is not supported", FSDP_VALUES[key][1])
        if key not in FSDP_VALUES and key not in FSDP_KEYS:
            raise _fsdp_error(f"unknown or unsupported key {name}", f"known keys: {', '.join(FSDP_KEYS)}")
        settings[key] = value
    return settings


def strategy_of(settings: Mapping[str, Any]) -> Strategy:
    """Return the strategy that settings of `fsdp_settings` mean."""
    return "full_shard" if str(settings["reshard_after_forward"]).lower() == "true" else "shard_grad_op"


def _strategy(value: str | bool) -> Strategy:
    """Return the strategy that a value of --fsdp names. Raises UserError for another one."""
    words = [word for word in str(value).replace(",", " ").split() if word != "auto_wrap"]
    if words and words[0].lower() in ("yes", "true", "1"):
        words[0] = "full_shard"
    for strategy in RESHARDS:
        if words == [strategy]:
            return strategy
    raise _fsdp_error(f"expected {' or '.join(RESHARDS)}, got {value!r}", "use  --fsdp full_shard")


def _require_fsdp_alone(train: Mapping[str, Any]) -> None:
    """Raise UserError for training arguments that FSDP2 does not support here."""
    refused = {
        "deepspeed": "use one of both",
        "fp16": "use --bf16",
        "torch_compile": "train without --torch_compile",
    }
    for name, hint in refused.items():
        if train.get(name):
            raise _fsdp_error(f"does not work together with --{name}", hint)


def _fsdp_error(message: str, hint: str) -> UserError:
    return UserError(message, code="launch-fsdp", where=Key.of("train.fsdp"), hint=hint)


def require_processes_for_fsdp(train: Mapping[str, Any]) -> None:
    """Raise UserError if a single process would train with FSDP, which has nothing to shard then."""
    if train.get("fsdp") and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise _fsdp_error(
            "needs several processes, and this is one", "start it with  torchrun --nproc_per_node N -m milora_vl.train"
        )
