"""The files that a run writes when its first step begins, and the contents of environment.json and policy.json.

A run that fails earlier leaves no files.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_model_param_count

from milora_data.encode.templates import OWN, render_chat_template
from milora_data.encode.tokens import remember_legacy
from milora_vl.core.adapter import checkpoints
from milora_vl.models import loading
from milora_vl.train.model import Built
from milora_vl.train.plan.plan import Plan
from milora_vl.train.plan.run_data import RunData
from milora_vl.train.plan.run_folder import ENVIRONMENT, RunFolder, lock, refuse_to_overwrite, unlock
from milora_vl.train.plan.screen import Screen
from milora_vl.train.recipe.hf_flags import value_of
from milora_vl.train.recipe.schema import Recipe

GIT_TIMEOUT = 10  # seconds
PACKAGES = ("milora-vl", "torch", "transformers", "peft", "accelerate", "timm", "deepspeed", "bitsandbytes")


def describe_environment(
    plan: Plan, *, base: str, device: str, data: RunData, dtype: str, processes: int
) -> dict[str, Any]:
    """Return environment.json for the start of a run; `dtype` is the dtype of the frozen weights."""
    recipe = plan.recipe
    return {
        "command": ["python", "-m", "milora_vl.train", *plan.settings.request.words],
        "versions": {"python": sys.version.split()[0], **_versions()},
        "git": _git_state(),
        "device": device,
        "processes": processes,
        "dtype": dtype,
        "started": plan.started.isoformat(timespec="seconds"),
        "finished": None,
        "seconds": 0.0,
        "seconds_before_training": 0.0,  # of these: loading, calibration
        "seed": value_of(recipe.train, "seed"),
        "model": recipe.model,
        "base": base,
        "data": data.counts(),
        "records": data.fingerprint,
        "pictures": data.pictures,
    }


def policy_json(built: Built) -> dict[str, Any]:
    """Return the content of policy.json: targets, measurements of layers, protections and parameter counts."""
    return {
        "targets": [target.to_dict() for target in built.targets],
        "layers": [asdict(layer) for layer in built.report],
        "protection": {path: asdict(protection) for path, protection in built.model.milora_protection.items()},
        "trainable": get_model_param_count(built.model, trainable_only=True),
        "total": get_model_param_count(built.model),
    }


def base_name(base: nn.Module) -> str:
    """Return the name or folder of the base model, as adapters record it."""
    assert isinstance(base, PreTrainedModel)
    return str(base.config.name_or_path)


def device_name(device: torch.device) -> str:
    """Return `cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def set_chat_template(processor: Any, template: str) -> None:
    """Set the chat template of processor and tokenizer, so that it renders exactly the prompt of training."""
    tokenizer, image_processor = loading.split_processor(processor)
    remember_legacy(tokenizer)
    if template != OWN:
        tokenizer.chat_template = render_chat_template(template, tokenizer, bos=image_processor is None)
    if image_processor is not None:
        processor.chat_template = tokenizer.chat_template


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_state() -> dict[str, Any] | None:
    source = Path(__file__).parent
    try:
        commit = _git("-C", str(source), "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git("-C", str(source), "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or a timeout
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT
    ).stdout.strip()


@dataclass(kw_only=True)
class FirstFiles:
    """The first files of a run. Only a new run writes the files in `content` (policy.json, spectrum.json)."""

    folder: RunFolder
    recipe: Recipe
    environment: dict[str, Any]
    content: Mapping[str, Any]
    screen: Screen
    is_writer: bool  # one of several processes writes
    has_begun: bool = False
    absent: Sequence[Path] = field(default_factory=list)  # folders that the run creates, innermost first
    lock: FileLock | None = None

    def __post_init__(self) -> None:
        path = self.folder.path
        self.absent = [folder for folder in (path, *path.parents) if not folder.exists()]

    def write(self) -> None:
        """Lock the run folder, write the files and rename incomplete checkpoints. Later calls do nothing."""
        if self.has_begun:
            return
        if self.is_writer:  # before has_begun: a run that another one locks out writes nothing
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder.path)
            if self.folder.is_new:  # loading takes minutes, and only this step locks the folder
                refuse_to_overwrite(self.folder.path)
        self.has_begun = True
        if not self.is_writer:
            return
        for checkpoint, reason in self.folder.incomplete:
            self.screen.warn(f"{checkpoint.name} {reason}; it is kept as {checkpoints.set_aside(checkpoint).name}")
        self.folder.write_text("recipe.yaml", self.recipe.to_yaml())
        self.folder.write_json(ENVIRONMENT, self.environment)
        for name, value in self.content.items():
            self.folder.write_json(name, value)

    def close(self) -> None:
        """Release the lock of the run folder, and remove the empty folders of a run that has not begun."""
        if self.is_writer and not self.has_begun:
            for folder in self.absent:
                try:
                    folder.rmdir()
                except OSError:  # not empty, or never created
                    break
        if self.lock is not None:
            unlock(self.folder.path, self.lock)
            self.lock = None


class AtFirstStep(TrainerCallback):
    """Call `act` when the first step begins, after its batch has loaded."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Call `act` before every step; `act` ignores repeated calls."""
        self.act()
