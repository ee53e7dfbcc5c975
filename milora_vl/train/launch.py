"""Processes and devices of a run: DeepSpeed, FSDP2, Hugging Face's arguments, data types, the base on its device."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils import get_mixed_precision_context_manager
from torch import nn
from torch.torch_version import TorchVersion
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import trainer_log_levels
from transformers.utils import is_accelerate_available

import llava_recipes
from milora_vl.common.compat.transformers import layer_kinds, unstarted_arguments, use_one_gpu
from milora_vl.common.errors import Key, UserError, first_line
from milora_vl.core.adapter import folders
from milora_vl.core.adapter.lora import base_model_of
from milora_vl.core.policy import Target
from milora_vl.models.base import Base, is_to_build
from milora_vl.models.devices import fastest_dtype, quantization_config, train_device, unquantized
from milora_vl.models.loading import load_weights
from milora_vl.models.projector import load_projector
from milora_vl.train.settings import AUTOCAST, RENAMED, Recipe, Request, value_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerControl, TrainerState


# What depends on the processes and the device of the run: a plan is made on any machine.
OF_THE_MACHINE = (
    "deepspeed", "fsdp", "fsdp_config", "use_cpu", "bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval",
    "push_to_hub", "hub_token",
)  # fmt: skip
Strategy = Literal["full_shard", "shard_grad_op"]
# --fsdp: whether the weights of a layer are freed between its forward and its backward. FSDP1 is not supported: it
# gives all weights of a layer one dtype, and an adapter in float32 beside a base in bfloat16 has two.
RESHARDS: dict[Strategy, bool] = {"full_shard": True, "shard_grad_op": False}
QUANT = "pip install -e '.[quant]'"
ERRORS = (ValueError, TypeError, KeyError, ImportError, NotImplementedError, OSError)


def _keywords(train: Mapping[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    older = {new: old for old, new in RENAMED.items() if old in fields}
    return {name if name in fields else older[name]: value for name, value in train.items()}


def missing_packages(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Return the packages that the run needs and that are not installed: name, key of the setting, what to do."""
    train, optim = recipe.train, str(recipe.train.get("optim") or "")
    of_bitsandbytes = (
        optim.startswith("paged_") or "bnb" in optim or optim in ("lion_8bit", "ademamix_8bit", "adamw_8bit")
    )
    needs = (
        (train.get("use_liger_kernel"), "liger_kernel", "train.use_liger_kernel", "pip install liger-kernel"),
        (of_bitsandbytes, "bitsandbytes", "train.optim", f"{QUANT}, or --optim adamw_torch"),
        (recipe.quantization != "none", "bitsandbytes", "quantization", QUANT),
        (train.get("deepspeed"), "deepspeed", "train.deepspeed", "pip install -e '.[deepspeed]', or --deepspeed \"\""),
        (is_to_build(recipe.model), "gguf", "model", "pip install -e '.[demo]'"),
    )
    return [need[1:] for need in needs if need[0] and importlib.util.find_spec(need[1]) is None]


def _require_installed(recipe: Recipe, base: Base, *, is_started: bool) -> None:
    """Raise UserError for a missing package that a plan needs too, or (`is_started`) the run alone."""
    train = recipe.train
    for package, key, hint in missing_packages(recipe) if is_started else ():
        message = f"the package {package} is not installed"
        raise UserError(message, code="package-missing", where=Key.of(key), hint=hint)
    set_attention(deepcopy(base.meta), recipe)
    named = train.get("report_to") or []
    trackers = [name for name in ([named] if isinstance(named, str) else named) if name not in ("all", "none")]
    try:
        for callback in get_reporting_integration_callbacks(trackers):  # it looks for its package
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        hint = "install it, or use --report_to none: report.html shows the losses"
        where = Key.of("train.report_to")
        raise UserError(first_line(error), code="tracker-unavailable", where=where, hint=hint) from None


@dataclass(frozen=True, slots=True)
class Launch:
    """The `train:` section as a run needs it: what follows from model, rules, device and launcher is in it."""

    train: dict[str, Any] = field(default_factory=dict)  # keywords of TrainingArguments by their newest names
    dtype: torch.dtype = torch.float32  # of the frozen weights
    deepspeed: dict[str, Any] | None = None
    fsdp: Strategy | None = None
    compiled: dict[str, str] | None = None  # arguments of torch.compile for the blocks of the language tower
    warnings: tuple[str, ...] = ()

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def zero_stage(self) -> int:
        return int((self.deepspeed or {}).get("zero_optimization", {}).get("stage", 0))


def launch_of(
    recipe: Recipe, base: Base, targets: Sequence[Target], request: Request, *, is_started: bool = False
) -> Launch:
    """Return how a run starts: what it always sets, and what follows from model, rules, device and launcher.

    Raises UserError for arguments that Hugging Face or we do not support together.
    """
    _require_installed(recipe, base, is_started=is_started)
    deepspeed, fsdp, warnings = _launcher(recipe.train)
    train = dict(recipe.train)
    for name, value in FORCED.items():
        if train.get(name, value) != value:
            warnings.append(f"train.{name}: {train[name]} has no effect; it is always {value}")
        train[name] = value
    if train.get("train_sampling_strategy") == "group_by_length":
        del train["train_sampling_strategy"]  # our sampler does this; HF's sampler needs tokenized records
    if deepspeed is not None:
        train["deepspeed"] = deepspeed
    if fsdp is not None:
        train |= {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": RESHARDS[fsdp]}}
    device = train_device(train)
    dtype = _base_dtype(recipe, device, request)
    if recipe.dtype != "auto" and (autocast := AUTOCAST.get(str(dtype).removeprefix("torch."))):
        train.setdefault(autocast, True)
    if is_started and train.get("bf16") and device.type == "cpu" and fastest_dtype(device) != torch.bfloat16:
        warnings.append("bf16 is emulated by this CPU, which is slow (faster: --dtype float32 --bf16 False)")
    if device.type == "cpu":
        train.setdefault("use_cpu", True)  # HF rejects bf16 on a CPU without this
    # A batch without images holds a hidden one, so all trained parameters are used, except layers of the vision tower
    # that the model does not read.
    train.setdefault("ddp_find_unused_parameters", any(target.tower == "vision" for target in targets))
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
        train["liger_kernel_config"] = {"fused_linear_cross_entropy": False}
    # HF would compile the whole model, without our loss.
    is_compiled = train.pop("torch_compile", False)
    named = {name: train.pop(f"torch_compile_{name}", None) for name in ("backend", "mode")}
    options = {name: value for name, value in named.items() if value is not None}
    compiled = options if is_compiled or options else None
    launch = Launch(train, dtype, deepspeed, fsdp, compiled, tuple(warnings))
    _check(recipe, launch)
    return launch


def _launcher(train: Mapping[str, Any]) -> tuple[dict[str, Any] | None, Strategy | None, list[str]]:
    """Return the settings of DeepSpeed, read from the file that is named, the strategy of FSDP2, and warnings."""
    if train.get("fsdp"):
        _require_fsdp_alone(train)
        return None, fsdp_strategy(train["fsdp"]), []
    for name, flag in (("FSDP", "fsdp"), ("DEEPSPEED", "deepspeed")):
        is_on = os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes")
        if is_on and not train.get("deepspeed"):
            raise UserError(
                f"accelerate has settings of {name}, which differ from this command's",
                code=f"launch-accelerate-{flag}",
                hint=f"pass --{flag} to this command\n"
                "and let accelerate only start the processes: distributed_type: MULTI_GPU",
            )
    if not train.get("deepspeed"):
        return None, None, []
    settings, warnings = _complete_deepspeed(_read_deepspeed(train["deepspeed"]))
    return settings, None, warnings


def _read_deepspeed(config: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(config, str) and config in llava_recipes.names("deepspeed"):
        packaged: Mapping[str, Any] = json.loads(llava_recipes.read(config, "deepspeed"))
        return packaged
    if isinstance(config, str) and not Path(config).is_file():
        message = f"expected {', '.join(llava_recipes.names('deepspeed'))} or a JSON file, got {config}"
        hint = "name one of these, or a file that exists"
        raise UserError(message, where=Key.of("train.deepspeed"), hint=hint)
    content: Any = config
    if isinstance(config, str):
        try:
            content = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            content = error
    if not isinstance(content, Mapping):
        message = f"expected a JSON object or the name of a file with one, got {config!r}: {content}"
        raise UserError(message, where=Key.of("train.deepspeed"), hint="correct the file or the value")
    return content


def _complete_deepspeed(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
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
    return settings, warnings


def fsdp_strategy(value: str | bool) -> Strategy:
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


# The collator needs every field of a record, our loss needs the labels, and the log must show a NaN.
FORCED = {
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "prediction_loss_only": True,
    "logging_nan_inf_filter": False,
}
# What every evaluation during a training measures, without `eval_`.
MEASURED = ("loss", "runtime", "samples_per_second", "steps_per_second")


def _base_dtype(recipe: Recipe, device: torch.device, request: Request) -> torch.dtype:
    """Return the dtype of the frozen weights: --dtype, else the half precision of a run on a GPU, else float32."""
    name = recipe.dtype
    if name == "fastest" and (run := folders.resumed_run(request.output_dir, request.resume)):
        name = folders.recipe_of_run(run).get("dtype", name)  # what was the fastest there
    if name == "fastest":
        return fastest_dtype(device)
    if name != "auto":
        return getattr(torch, name)
    if device.type in ("cpu", "mps"):
        return torch.float32
    if recipe.train.get("bf16"):
        return torch.bfloat16
    return torch.float16 if recipe.train.get("fp16") else torch.float32


def _check(recipe: Recipe, launch: Launch) -> None:
    """Raise UserError for arguments that Hugging Face or we do not support with these rules and data."""
    train, is_quantized = launch.train, recipe.quantization != "none"
    metric = str(train.get("metric_for_best_model") or "loss").removeprefix("eval_")
    uses_metric = (
        train.get("load_best_model_at_end"),
        train.get("save_strategy") == "best",
        train.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"),
    )
    is_measured = metric in MEASURED or (metric.startswith("suite_") and recipe.eval.suite_every)
    has_evaluation = train.get("eval_strategy", "no") != "no" or train.get("save_strategy") == "best"
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
            launch.compiled is not None and launch.zero_stage == 3,
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


def hf_arguments(train: Mapping[str, Any], output_dir: Path, *, is_started: bool) -> TrainingArguments:
    """Return Hugging Face's arguments of this process. Raises UserError for what Hugging Face refuses.

    A plan does not start processes and writes nothing: without `is_started`, no device is looked for.
    """
    train = deepcopy(dict(train))  # HF writes into the settings of DeepSpeed
    if not is_started:
        train = {name: value for name, value in train.items() if name not in OF_THE_MACHINE} | {"use_cpu": True}
    if is_started and train.get("fsdp") and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        hint = "start it with  torchrun --nproc_per_node N -m milora_vl.train"
        raise _fsdp_error("needs several processes, and this is one", hint)
    with nullcontext() if is_started else _environment_kept(), refused_arguments():
        if is_started:
            _prepare_processes(train)
        make = TrainingArguments if is_started else unstarted_arguments
        args = make(output_dir=str(output_dir), **_keywords(train))
        _ = trainer_log_levels[args.log_level], trainer_log_levels[args.log_level_replica]
        if is_started:
            _start_deepspeed(train)
        with nullcontext() if is_started else suppress(ImportError):  # a plan names the missing package
            Trainer.get_optimizer_cls_and_kwargs(args)
        weight = torch.zeros(1, requires_grad=True)
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([weight], lr=args.learning_rate),  # `lr_end` is compared with it
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
def refused_arguments(kinds: tuple[type[Exception], ...] = ERRORS) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        message = f"transformers refuses these arguments: {' '.join(str(error).split())[:300]}"
        hint = "python -m milora_vl.train --help  lists all flags"
        raise UserError(message, code="train-arguments", where=Key.of("train"), hint=hint) from None


def stage_of(args: TrainingArguments) -> int:
    return int(args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)) if args.deepspeed else 0


def trained_dtype(args: TrainingArguments) -> torch.dtype:
    """Return the dtype of trained weights: float32, because half precision loses the steps of Adam.

    DeepSpeed in half precision keeps float32 copies and does not autocast, so all weights use its precision.
    """
    if args.deepspeed and args.hf_deepspeed_config.is_true("bf16.enabled"):
        return torch.bfloat16
    return torch.float16 if args.deepspeed and args.hf_deepspeed_config.is_true("fp16.enabled") else torch.float32


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
            stage, processes = train["deepspeed"].get("zero_optimization", {}).get("stage"), os.environ["WORLD_SIZE"]
            if stage == 3 and int(processes) > 1 and TorchVersion(deepspeed.__version__) < "0.19.8":
                message = f"DeepSpeed {deepspeed.__version__} on CPUs reads weights before they are gathered"
                hint = "pip install 'deepspeed>=0.19.8', or use --deepspeed zero2"
                raise UserError(message, where=Key.of("train.deepspeed"), hint=hint)
        deepspeed.init_distributed(verbose=False)


def load_base_model(recipe: Recipe, base: Base, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
    quantization = _quantization(recipe, base)
    model: Any = load_weights(recipe.model, dtype, quantization=quantization, device=device)
    model = (model if quantization is not None else model.to(device)).eval()
    set_attention(model, recipe)
    if recipe.projector_weights:
        load_projector(model, Path(recipe.projector_weights))
    return model, base.processor


def _quantization(recipe: Recipe, base: Base) -> Any:
    """Return the settings of bitsandbytes. As in LLaVA, 4-bit products use the precision of the training."""
    if recipe.quantization == "none":
        return None
    half = torch.bfloat16 if recipe.train.get("bf16") else torch.float16 if recipe.train.get("fp16") else torch.float32
    return quantization_config(
        recipe.quantization,
        unquantized(base.meta),
        compute_dtype=half,
    )


def attention_of(recipe: Recipe, tower: Literal["language", "vision"]) -> str:
    named = recipe.attn_implementation
    return named if isinstance(named, str) else named.get(tower, "sdpa")


def set_attention(model: Any, recipe: Recipe) -> None:
    """Set the attention of each tower. Raises UserError if transformers knows no such one, or lacks its package."""
    name: Any = recipe.attn_implementation
    if not isinstance(name, str):
        config, language = model.config, attention_of(recipe, "language")
        text = config.get_text_config()
        name = {key: attention_of(recipe, "vision") for key in config.sub_configs if key.startswith("vision")}
        name |= {key: language for key in config.sub_configs if getattr(config, key) is text} | {"": language}
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = first_line(error)
        message, hint = f"{recipe.attn_implementation} is not available here: {reason[:300]}", "use sdpa or eager"
        raise UserError(message, where=Key.of("attn_implementation"), hint=hint) from None


class RequireShards(TrainerCallback):
    """Raise RuntimeError if the training starts with whole weights: it would be DDP under another name."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            raise RuntimeError(f"FSDP2 has not sharded {len(whole)} parameters, such as {whole[0]}")
        base: Any = base_model_of(model)
        reads_rows = getattr(base.config.get_text_config(), "hidden_size_per_layer_input", None)
        if reads_rows and isinstance(embeddings := base.get_input_embeddings(), FSDPModule):
            embeddings.set_reshard_after_forward(False)  # Gemma 4 reads a row of them after their forward


def prepare_fsdp(accelerator: Accelerator, model: nn.Module) -> None:
    """Make FSDP2 compute as DDP does: autocast chooses the dtype of products, and gradients are reduced in float32.

    accelerate would cast every gathered weight to half precision, also the differences of an adapter, which lose
    their digits then.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it, and the next run of this process would read it
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    if plugin.transformer_cls_names_to_wrap is None:
        # transformers lists kinds of layers that this model may lack, such as CLIP's text embeddings; accelerate then
        # raises.
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present & layer_kinds(base_model_of(model)))
    if accelerator.native_amp:  # accelerate adds autocast to the forward of other wrappers, and not of this one
        autocast = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
        model.forward = autocast(model.forward)  # type: ignore[method-assign]
