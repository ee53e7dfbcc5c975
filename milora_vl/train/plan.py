"""`Run`: all that can be known of a run before data and weights load, for a training and for its dry run.

Each check stands beside the code that it protects; `make_run` calls them in a row. `show` prints the dry run. When a
run resumes, the optimizer, the schedule and the factors come from the checkpoint: only the keys of MAY_CHANGE differ.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import partial
from itertools import chain, groupby
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

import llava_recipes
from milora_data.batches.pack import require_packable
from milora_data.batches.record_collator import RecordCollator
from milora_data.check import KEY_BYTES, files_of
from milora_data.encode.templates import OWN, no_videos
from milora_data.encode.tokens import share_template
from milora_data.records.record import IMAGE, Record
from milora_vl.common import atomic_write
from milora_vl.common.cli.console import amount, beside, command_line, require_folder
from milora_vl.common.cli.screen import Screen
from milora_vl.common.cli.table import drawn
from milora_vl.common.errors import Key, Problem, UserError, at_flag, collected, first_line
from milora_vl.common.evaluator_protocol import QuestionSet, evaluator, is_file
from milora_vl.common.yaml_text import read_file
from milora_vl.core.adapter import checkpoints
from milora_vl.core.adapter.checkpoints import (
    HELD_OUT,
    is_sharded,
    num_processes,
    read_environment,
    step_of,
    zero_stage,
)
from milora_vl.core.adapter.folders import (
    module_path,
)
from milora_vl.core.adapter.initialize import LayerReport
from milora_vl.core.adapter.sidecar import read_sidecar, require_layers
from milora_vl.core.policy import Policy, Target
from milora_vl.core.policy.resolve import Selector
from milora_vl.core.policy.rules import (
    label_of,
    what_trains,
)
from milora_vl.core.policy.towers import find_towers
from milora_vl.models import loading, smol_llava
from milora_vl.models import parts as composing
from milora_vl.models.base import Base, find_base
from milora_vl.models.devices import fastest_dtype, quantized_layers, train_device
from milora_vl.models.loading import split_processor
from milora_vl.models.names import BUILT_IN_MODELS, hub_id
from milora_vl.models.parts import Parts
from milora_vl.models.processors import ProcessorSettings, configure_processor, usable_inputs
from milora_vl.models.projector import projector_file
from milora_vl.models.prompts import recipe_of_run
from milora_vl.models.smol_llava import folder_of
from milora_vl.train import data
from milora_vl.train.counts import (
    MIX665K,
    Batching,
    Costs,
    Counts,
    costs_of,
    frozen_towers,
    num_devices,
    num_parameters,
    trained_sizes,
)
from milora_vl.train.data import RunData, Task, read_earlier_records, task_entry
from milora_vl.train.launch import (
    RESHARDS,
    Launch,
    dtype_name,
    hf_arguments,
    read_launch,
    require_processes_for_fsdp,
    set_attention,
)
from milora_vl.train.recipe import (
    AUTOCAST,
    PROG,
    BaseKLConfig,
    CalibrationConfig,
    Changes,
    DataConfig,
    PartsConfig,
    Recipe,
    Request,
    default_rate,
    differences,
    load_recipe,
    value_of,
)
from milora_vl.train.settings import Settings, default_rules, to_merge

SMALL, SMALL_RATE = 1e9, 1e-3  # parameters of a small model, and the rate that it wants: docs/choose.md
QUANT = "pip install -e '.[quant]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that nothing is known to stop: what trains on which base, in which folder, and what it continues."""

    request: Request
    recipe: Recipe  # as it fits the base, without the hub's token
    base: Base
    targets: tuple[Target, ...]  # with the learning rates of the run
    derived: Derived
    args: TrainingArguments
    launch: Launch
    hub_token: str | None
    folder: RunFolder
    earlier: ResumedRun | None  # the run that it resumes
    started: datetime
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    tasks: tuple[Task, ...] = ()  # that the run comes after

    @property
    def base_kl(self) -> BaseKLConfig:
        """Return the term with its weight. `recipe` keeps an open weight open: another method has its own."""
        return base_kl_of(self.recipe, self.base, self.targets)

    @property
    def protects(self) -> bool:
        """Return whether the run chooses protected inputs; an adapter and a checkpoint have theirs already."""
        is_new = self.folder.checkpoint is None and self.recipe.adapter is None
        return is_new and any(target.protect for target in self.targets)

    @property
    def reads_calibration(self) -> bool:
        return self.protects or bool(self.base_kl.weight)

    def on_records(self, *, has_pictures: bool) -> tuple[Run, str]:
        """Return the run on records with or without pictures, and a note.

        Where no picture calibrates a protected projector, it stays frozen.
        """
        has_pictures = has_pictures and self.recipe.calibration.num_pictures > 0
        kept = tuple(target for target in self.targets if target.tower != "projector" or not target.protect)
        is_needed = self.recipe.adapter is None and self.recipe.calibration.data is None
        if has_pictures or not is_needed or len(kept) in (0, len(self.targets)):
            return self, ""
        return replace(self, targets=kept), "note: no picture calibrates the projector, so it stays frozen"

    def composed(self) -> tuple[Run, str]:
        """Return the run on a base that exists, composed of its parts at first use, and a log line.

        If several processes call this, one of them composes the base.
        """
        parts = self.base.parts
        if parts is None:
            loading.prepare(self.recipe.model)
            return self, ""
        path, is_new = composing.base_folder(parts)
        done = "composed" if is_new else "composed before"
        line = f"base {path}, {done} from {parts.describe()}; the adapter refers to it"
        return replace(self, recipe=_on_composed(self.recipe, path), base=find_base(str(path))), line


def make_run(settings: Settings, *, is_started: bool) -> Run:
    """Check everything that can be checked without data and weights. A plan (not `is_started`) starts no process."""
    request, started = settings.request, datetime.now().astimezone()
    recipe, base, targets, warnings = fit(settings)
    token = recipe.train.get("hub_token")  # run folders are shared, so they must not hold it
    train = {name: value for name, value in recipe.train.items() if name != "hub_token"}
    recipe = with_dtype(recipe.model_copy(update={"train": train}), request)
    path = Path(request.output_dir) if request.output_dir else default_folder(recipe, started)
    run_folder = choose_folder(path, request.resume)
    tasks, notes = tasks_before(recipe, base.meta, targets, run_folder.checkpoint)
    launch = read_launch(recipe.train)
    require_installed(recipe, base, is_started=is_started)
    derived = derived_arguments(recipe, targets, launch)
    check_arguments(recipe, derived, launch)
    if is_started:
        require_processes_for_fsdp(recipe.train)
    args = hf_arguments(derived.train, path, is_started=is_started)
    dtype, devices = dtype_name(recipe), num_devices(request)
    earlier = read_resumed(run_folder, request.resume, partial(_as_composed, recipe, base), dtype, devices)
    warnings += [*notes, *derived.warnings]
    if is_started and args.bf16 and args.device.type == "cpu" and fastest_dtype(args.device) != torch.bfloat16:
        warnings.append("bf16 is emulated by this CPU, which is slow (faster: --dtype float32 --bf16 False)")
    if is_started and args.world_size == 1 and args.device.type == "cuda" and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        command = f"torchrun --nproc_per_node {count} -m milora_vl.train ..."
        warnings.append(f"this run uses one of {count} GPUs; to use all: {command}")
    return Run(
        request=request,
        recipe=recipe,
        base=base,
        targets=tuple(with_rates(targets, recipe.train)),
        derived=derived,
        args=args,
        launch=launch,
        hub_token=token,
        folder=run_folder,
        earlier=earlier,
        started=started,
        notes=(*settings.notes, *default_notes(recipe, base, request)),
        warnings=tuple(warnings),
        tasks=tasks,
    )


def with_dtype(recipe: Recipe, request: Request) -> Recipe:
    """Return the recipe with the dtype that `fastest` means on this machine, or meant in the run that it resumes."""
    if recipe.dtype != "fastest":
        return recipe
    run = checkpoints.resumed_run(request.output_dir, request.resume)
    before = None
    if run is not None and (run / "recipe.yaml").is_file():  # else nothing was saved: the run starts again
        before = read_file(run / "recipe.yaml").get("dtype")
    fastest = str(fastest_dtype(train_device(recipe.train))).removeprefix("torch.")
    return recipe.model_copy(update={"dtype": before or fastest})


def fit(settings: Settings) -> tuple[Recipe, Base, list[Target], list[str]]:
    recipe, problems, targets, notes = settings.recipe, list[Problem](), list[Target](), list[str]()
    with at_flag(Key.of("model")):
        base = _base_of_run(recipe)
    with collected(problems):
        if "policy" not in settings.is_set:
            rules, notes = default_rules(settings, base)
            recipe = recipe.model_copy(update={"policy": rules})
        targets = Policy.parse(recipe.policy or []).resolve(base.meta)
    if base.own_pictures and "template" not in settings.is_set:
        recipe = recipe.model_copy(update={"template": OWN})
    for refuse in (_check_pictures, _check_base_kl, _check_calibration, _check_quantization):
        with collected(problems):
            refuse(recipe, base, targets)
    if problems:
        raise UserError(problems=problems)
    return recipe, base, targets, [*notes, *_recipe_warnings(recipe, base, targets)]


def _base_of_run(recipe: Recipe) -> Base:
    """Return the base of a run: a model by its name, composed with the tower of `parts` if it reads no images itself.

    Loads no weights. Raises UserError for an unknown name, or a config that is not available.
    """
    named = recipe.parts
    if named.vision_tower is None:
        return find_base(recipe.model)
    tower, weights = named.vision_tower, named.vision_weights
    parts = Parts(recipe.model, tower, recipe.projector_weights, named.select_layer, named.select_feature, weights)
    return find_base(recipe.model, parts)


def _on_composed(recipe: Recipe, path: Path) -> Recipe:
    return recipe.model_copy(update={"model": str(path), "parts": PartsConfig(), "projector_weights": None})


def _as_composed(recipe: Recipe, base: Base, model: str) -> Recipe:
    """Return the recipe as an earlier run has it: on its composed base `model`, if that one has the same parts."""
    is_same = base.parts is not None and composing.planned_folder(base.parts).name == Path(model).name
    return _on_composed(recipe, Path(model)) if is_same else recipe


def base_kl_of(recipe: Recipe, base: Base, targets: Sequence[Target]) -> BaseKLConfig:
    """Return `base_kl` with its weight; if none is set, the default keeps what the base says about pictures, too.

    A term of the loss reaches the five percent of the inputs that protection does not (docs/results.md).
    """
    if recipe.base_kl.weight is not None:
        return recipe.base_kl
    is_default = any(target.method == "milora" and target.protect for target in targets)
    return recipe.base_kl.model_copy(update={"weight": 1.0 if is_default and base.reads_pictures else 0.0})


def _check_pictures(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    """Raise UserError if the model does not take pictures, or packed records, as the recipe prepares them."""
    data, name, ratio, tiling = recipe.data, base.name, recipe.data.image_aspect_ratio, base.tiling
    if data.packing:
        with at_flag(Key.of("data.packing")):
            require_packable(base.config)
    if base.own_pictures:
        if recipe.template != OWN:
            message = f"{name} ({base.config.model_type}) is trained with its own prompt format, not {recipe.template}"
            hint = f"use --template {OWN}, or remove the setting"
            raise UserError(message, where=Key.of("template"), hint=hint)
        if ratio != "pad":
            message = f"{ratio} is for LLaVA; the processor of {name} decides the shape of pictures"
            where, hint = Key.of("data.image_aspect_ratio"), "remove the setting"
            raise UserError(message, code="image-aspect-ratio", where=where, hint=hint)
        return
    if data.min_pixels is not None or data.max_pixels is not None:
        message = f"{name} resizes pictures to fixed sizes" if base.reads_pictures else f"{name} reads only text"
        where = Key.of("data.min_pixels" if data.max_pixels is None else "data.max_pixels")
        raise UserError(message, code="pixels-unsupported", where=where, hint="remove the limit")
    for key in processor_settings(data).of_videos:
        with at_flag(Key.of(f"data.{key}")):
            raise no_videos(name)
    if (ratio == "anyres" and tiling is None) or (ratio == "plain" and tiling is not None):
        message = f"{ratio}, but {name} {'sees a picture once' if tiling is None else 'tiles its pictures'}"
        where, hint = Key.of("data.image_aspect_ratio"), "use pad or plain" if tiling is None else "use anyres"
        raise UserError(message, code="image-aspect-ratio", where=where, hint=hint)


def processor_settings(data: DataConfig) -> ProcessorSettings:
    return ProcessorSettings(**{key.name: getattr(data, key.name) for key in fields(ProcessorSettings)})


def _check_base_kl(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    """Raise UserError if `base_kl` has no base to compare with: the training changes it."""
    if recipe.base_kl.weight and targets and all(target.rank is None for target in targets):
        message, hint = (
            "compares with the base, which this training changes",
            "train an adapter, or set the weight to 0",
        )
        raise UserError(message, code="base-kl-needs-base", where=Key.of("base_kl.weight"), hint=hint)


def _check_calibration(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    name = recipe.calibration.data
    if name and not Path(name).exists() and not name.startswith("hub:"):
        where = Key.of("calibration.data")
        raise UserError(f"{name}: no such file", code="path-missing", where=where, hint=beside(Path(name)))


def _check_quantization(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    if recipe.quantization == "none":
        return
    quantized = set(quantized_layers(base.meta))
    packed = [target.path for target in targets if target.rank is None and target.path in quantized]
    if packed:
        message = f"{amount(len(packed), 'quantised module')} would train in full, first {packed[0]}"
        hint = "train an adapter on quantised weights: --lora_enable True, or --method milora"
        raise UserError(message, where=Key.of("quantization"), hint=hint)


def _recipe_warnings(recipe: Recipe, base: Base, targets: Sequence[Target]) -> list[str]:
    messages = []
    if recipe.parts != PartsConfig() and base.parts is None:
        has = "keeps the vision tower that it was trained with" if base.reads_pictures else "reads only text"
        messages.append(f"parts: no effect, {base.name} {has}")
    if base.parts is not None and recipe.template == OWN:
        messages.append(f"--template {OWN}: a composed base uses vicuna_v1, not the template of {base.name}")
    has_term = bool(base_kl_of(recipe, base, targets).weight)
    if recipe.calibration != CalibrationConfig() and not has_term and not any(target.protect for target in targets):
        messages.append("the calibration has no effect: no rule has protect, and base_kl has no weight")
    if recipe.base_kl.model_copy(update={"weight": None}) != BaseKLConfig() and not has_term:
        messages.append("base_kl has no effect: its weight is 0")
    tiling, longest = base.tiling, recipe.data.max_length
    if tiling is not None and recipe.data.image_aspect_ratio == "pad":
        messages.append(f"this model splits images into tiles of {tiling.tile} pixels: use image_aspect_ratio anyres")
    if tiling is not None and tiling.most_tokens >= longest:
        messages.append(
            f"an image takes up to {tiling.most_tokens:,} tokens: max_length {longest:,} cuts large images "
            "and the text after them (use --max_length 4096)"
        )
    return messages


def with_rates(targets: Sequence[Target], train: Mapping[str, Any]) -> list[Target]:
    decay = value_of(train, "weight_decay")
    return [
        replace(
            target,
            learning_rate=target.learning_rate or default_rate(train, target.method),
            weight_decay=decay if target.weight_decay is None else target.weight_decay,
        )
        for target in targets
    ]


def default_notes(recipe: Recipe, base: Base, request: Request) -> list[str]:
    """Return what a small model wants in place of the default rate and epochs, if the user has set neither."""
    train = recipe.train
    size = sum(parameter.numel() for parameter in base.meta.parameters())
    is_set = request.recipe or request.policy or recipe.adapter or "learning_rate" in train
    if is_set or size >= SMALL or request.edits.method in ("full", "projector"):
        return []
    has_epochs = "num_train_epochs" in train or train.get("max_steps")
    epochs = "" if has_epochs else ", and up to 2,000 records with  --num_train_epochs 1"
    return [f"note: models below 1B learn best with  --learning_rate {SMALL_RATE:g}{epochs} (docs/choose.md)"]


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
        (smol_llava.is_to_build(recipe.model), "gguf", "model", "pip install -e '.[demo]'"),
    )
    return [need[1:] for need in needs if need[0] and importlib.util.find_spec(need[1]) is None]


def require_installed(recipe: Recipe, base: Base, *, is_started: bool) -> None:
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


def require_usable(recipe: Recipe, base: Base) -> None:
    """Raise UserError, before any weights load, if a part is missing or pictures cannot be prepared for the model.

    The processor of the base then follows the recipe.
    """
    if recipe.factor_cache:  # a complete cache may be on a disk that is read-only
        require_folder(Path(recipe.factor_cache), Key.of("factor_cache"), is_written=False)
    if base.own_pictures:
        configure_processor(base.processor, processor_settings(recipe.data))
        usable_inputs(base.processor, base.name)
    if base.parts is not None:
        composing.require_parts(base.parts)
    elif recipe.projector_weights:
        projector_file(Path(recipe.projector_weights))


def suites_of(recipe: Recipe) -> dict[str, str | None]:
    return {suite: data_of(suite, recipe, recipe.eval.data) for suite in recipe.eval.suites}


def data_of(suite: str, recipe: Recipe, data: str | None) -> str | None:
    """Return `data`; without it, the pictures of own questions (FILE.json) are in the folder of the training's."""
    return data or (recipe.data.image_folder if is_file(suite) else None)


def require_evaluation(recipe: Recipe) -> None:
    """Raise UserError for errors that would appear only after training: an unknown suite or missing files."""
    suites = recipe.eval.suites
    if recipe.eval.suite_every is not None and not suites:
        hint = "name one in the recipe:  eval: {suites: [quick], data: FOLDER, suite_every: N}"
        where = Key.of("eval.suite_every")
        raise UserError("there is no suite to score", code="flag-needs-another", where=where, hint=hint)
    for suite, files in suites_of(recipe).items():
        questions = QuestionSet(suite, files)
        evaluator().require_questions(questions, at=Key.of("eval.suites"), data_at=Key.of("eval.data"))


ENVIRONMENT, CARD = "environment.json", "README.md"  # shared with others, so secrets in them are hidden
OWN_FILES = ("recipe.yaml", CARD, "policy.json", "report.html", HELD_OUT)


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path
    checkpoint: Path | None = None
    incomplete: tuple[tuple[Path, str], ...] = ()  # skipped checkpoints, with the reason
    is_new: bool = True  # it holds no run, and must hold none when the first step begins

    @property
    def writes_policy(self) -> bool:
        """Return whether the run writes policy.json; a resumed run has it already."""
        return self.checkpoint is None or not (self.path / "policy.json").is_file()

    def write_json(self, name: str, content: Any) -> None:
        atomic_write.write_json(self.path / name, content, hides_secrets=name == ENVIRONMENT)

    def write_text(self, name: str, text: str) -> None:
        atomic_write.write_text(self.path / name, text, hides_secrets=name == CARD)


def default_folder(recipe: Recipe, now: datetime) -> Path:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = "a run on several devices needs --output_dir"
        raise UserError(message, code="flag-required", where="--output_dir", hint="add:  --output_dir FOLDER")
    first = (recipe.policy or [{}])[0]
    rank = first.get("rank")
    method = str(first.get("method", "milora")) + (f"-r{rank}" if isinstance(rank, int) else "")
    return Path("runs") / Path(recipe.model).name / method / now.strftime("%Y-%m-%d_%H%M%S")


def choose_folder(path: Path, resume: str | None) -> RunFolder:
    """Return the folder of the run, for `--resume_from_checkpoint` (None, true, auto, or a folder)."""
    require_folder(path)
    wanted = checkpoints.asked_for(resume)
    if wanted is None:
        refuse_to_overwrite(path)
        return RunFolder(path)
    if not checkpoints.is_word(wanted):
        chosen = _require_complete(Path(wanted))
        is_new = chosen.resolve().parent != path.resolve()
        if is_new:
            refuse_to_overwrite(path)
        return RunFolder(path, chosen, is_new=is_new)
    checkpoint, skipped = checkpoints.latest(path)
    if checkpoint is None and wanted.lower() != "auto":
        reasons = [f"{folder.name}: {reason}" for folder, reason in skipped] or ["the folder has no checkpoint"]
        message = "nothing to resume from\n" + "\n".join(reasons)
        hint = "remove --resume_from_checkpoint to start, or use auto to resume only if there is a checkpoint"
        raise UserError(message, code="resume-no-checkpoint", where=str(path), hint=hint)
    # Weights of a run that was killed before its first complete checkpoint are overwritten.
    restarts = bool(skipped) or (checkpoints.holds_weights(path) and bool(checkpoints.read_environment(path)))
    is_new = checkpoint is None and not restarts
    if is_new:
        refuse_to_overwrite(path)
    return RunFolder(path, checkpoint, tuple(skipped), is_new)


def refuse_to_overwrite(path: Path) -> None:
    """Raise UserError for a folder that holds a run, or files of somebody else under the names of a run's files."""
    weights = [name for name in checkpoints.WEIGHTS if (path / name).is_file()]
    steps = [folder.name for folder in checkpoints.checkpoints(path)]
    foreign = [name for name in OWN_FILES if (path / name).exists()]
    if weights:
        kind = "a finished run" if checkpoints.is_finished(path) else "trained weights"
        message, code = f"the folder holds {kind} ({weights[0]}); nothing is overwritten", "run-exists"
        hint = f"use another --output_dir, or remove the folder\nsee it: python -m milora_vl.report {path}"
    elif steps:
        message = f"the folder holds {amount(len(steps), 'checkpoint')} ({steps[-1]}) of an unfinished run"
        code, hint = "run-unfinished", "to continue it:       --resume_from_checkpoint true\n"
        hint += "to start a new run:   another --output_dir, or remove the folder"
    elif foreign and not checkpoints.read_environment(path):
        message, code = f"the folder holds {', '.join(foreign)}, but not from a milora_vl run", "run-foreign-files"
        hint = "use another --output_dir"
    else:
        return
    raise UserError(message, code=code, where=str(path), hint=hint)


def _require_complete(folder: Path) -> Path:
    where = "--resume_from_checkpoint"
    if not folder.is_dir():
        hint = "expected true, auto or a checkpoint folder"
        raise UserError(f"no such folder: {folder}", code="path-missing", where=where, hint=hint)
    if reason := checkpoints.why_incomplete(folder):
        hint = "use another checkpoint, or  --resume_from_checkpoint auto  for the newest complete one"
        raise UserError(f"cannot resume from {folder}: {reason}", where=where, hint=hint)
    return folder


COLUMNS = ("modules", "number", "method", "rank", "alpha", "parameters", "rate", "energy", "trains")


def show_policy(screen: Screen, rows: Sequence[tuple[str, ...]], frozen: Sequence[str]) -> None:
    cells = [row[:-1] for row in rows] + [(tower, "-", "frozen", *[""] * 5) for tower in frozen]
    drawn(screen.console, COLUMNS[:-1], cells, left=("modules", "method"))
    for modules, *_, trains in rows:
        screen.say(f"{modules}: {trains}")


def policy_rows(
    rules: Sequence[Mapping[str, Any]],
    targets: Sequence[Target],
    sizes: Mapping[str, int],
    base: nn.Module,
    report: Sequence[LayerReport] = (),
) -> list[tuple[str, ...]]:
    """Return one row per rule that is the last one about some modules, with its selector as written.

    The targets have resolved rates. `sizes` maps the path of a target to its number of trained parameters, `report`
    holds measurements of the adapters. A rule about layers that earlier rules set apart shows the range of a value.
    """
    selector, last, by_path = Selector(base, find_towers(base)), dict[str, int](), {t.path: t for t in targets}
    for number, rule in enumerate(rules):
        whole = rule.get("method") in ("full", "frozen")
        last |= dict.fromkeys(selector.match(rule["modules"], whole_modules=whole, planned=last.keys()), number)
    energies = {layer.path: 100 * layer.energy for layer in report}
    rows: list[tuple[str, ...]] = []
    for number, rule in enumerate(rules):
        group = [by_path[path] for path, other in last.items() if other == number and path in by_path]
        if not group:
            continue
        rows.append(
            (
                rule["modules"],
                f"{len(group):,}",
                " ".join(sorted({label_of(target.method, target.protect) for target in group})),
                _span([target.rank for target in group if target.rank]),
                _span([target.alpha for target in group if target.alpha]),
                f"{sum(sizes[target.path] for target in group):,}",
                _span([target.learning_rate or 0.0 for target in group]),
                _span([energies[target.path] for target in group if target.path in energies], "{:.2g}", " %"),
                what_trains(group[0].method, group[0].protect),
            )
        )
    return rows


def _span(values: Sequence[float], form: str = "{:g}", unit: str = "") -> str:
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return (low if low == high else f"{low} - {high}") + unit


def trainable_line(trained: int, total: int) -> str:
    """Return PEFT's line about trained parameters, word for word, because users grep it.

    >>> trainable_line(1, 8)
    'trainable params: 1 || all params: 8 || trainable%: 12.5000'
    """
    return f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}"


# The collator needs every field of a record, our loss needs the labels, and the log must show a NaN.
FORCED = {
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "prediction_loss_only": True,
    "logging_nan_inf_filter": False,
}
# What every evaluation during a training measures, without `eval_`.
MEASURED = ("loss", "runtime", "samples_per_second", "steps_per_second")


@dataclass(frozen=True, slots=True)
class Derived:
    """The `train:` section with derived values, as keywords of TrainingArguments by their newest names."""

    train: dict[str, Any]
    compiled: dict[str, str] | None  # arguments of torch.compile for the blocks of the language tower
    warnings: tuple[str, ...]


def derived_arguments(recipe: Recipe, targets: Sequence[Target], launch: Launch) -> Derived:
    """Return the arguments of a run: what it always sets, and what follows from the model, the rules and the device."""
    train, warnings = dict(recipe.train), list(launch.warnings)
    for name, value in FORCED.items():
        if train.get(name, value) != value:
            warnings.append(f"train.{name}: {train[name]} has no effect; it is always {value}")
        train[name] = value
    if train.get("train_sampling_strategy") == "group_by_length":
        del train["train_sampling_strategy"]  # our sampler does this; HF's sampler needs tokenized records
    if launch.deepspeed is not None:
        train["deepspeed"] = launch.deepspeed
    if launch.fsdp is not None:
        train |= {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": RESHARDS[launch.fsdp]}}
    if autocast := AUTOCAST.get(recipe.dtype):
        train.setdefault(autocast, True)
    device = train_device(train)
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
    return Derived(train, options if is_compiled or options else None, tuple(warnings))


def check_arguments(recipe: Recipe, derived: Derived, launch: Launch) -> None:
    """Raise UserError for arguments that neither Hugging Face nor we support with these rules and data."""
    train, is_quantized = derived.train, recipe.quantization != "none"
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


# Paths, logging, saving, speed, and what is compared elsewhere: the records, the steps, and the batch in total.
MAY_CHANGE = re.compile(
    r"factor_cache|attn_implementation|calibration\.image_folder|data\.(path|image_folder)"
    r"|(sweep|eval)\..+"
    r"|train\.(learning_rate|weight_decay|max_steps|num_train_epochs|gradient_accumulation_steps|disable_tqdm|run_name"
    r"|(activation_checkpointing|logging_|log_|save_total|save_on|save_only|hub_|push_|report_|dataloader_[npm]"
    r"|dataloader_persistent|ddp_|deepspeed|fsdp|torch_|use_|liger_|per_device_|project|trackio|do_|include_|debug"
    r"|enable_jit|restore_callback|skip_memory|batch_eval|eval_accumulation|eval_do|eval_use|length_column).*)"
)
# Free unless evaluations choose the best checkpoint or set the learning rate.
OF_EVALUATION = re.compile(r"data\.eval_path|eval\.suite_.*|train\.(eval_.*|save_.*|metric_.*|greater_.*|.*_full_eval)")
# Not free for a stream, whose records have no fingerprint, and which is divided among processes.
OF_STREAM = re.compile(r"data\.path|train\.(per_device_train_batch_size|dataloader_num_workers)")
# Schedules whose rates do not depend on the last step, unless the warm-up is a share of all steps.
SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
SCHEDULES_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
NEW_RUN = "to start a new run:  another --output_dir, without --resume_from_checkpoint"


@dataclass(frozen=True, slots=True)
class ResumedRun:
    """The run that a command resumes, as its folder holds it, and the free keys that have changed since."""

    folder: Path
    checkpoint: Path | None  # None: the run is finished and has none
    is_finished: bool  # --resume_from_checkpoint auto finds it at its end
    recipe: Recipe
    environment: Mapping[str, Any]
    changes: Changes

    @property
    def gets_steps(self) -> bool:
        return not self.is_finished or bool({"train.max_steps", "train.num_train_epochs"} & self.changes.keys())


def read_resumed(
    run: RunFolder, resume: str | None, recipe_on: Callable[[str], Recipe], dtype: str, processes: int
) -> ResumedRun | None:
    """Return the run that `--resume_from_checkpoint` continues in this folder, None if a new run starts.

    `recipe_on` is the new recipe on the base model of the earlier run. Raises UserError without a recipe to compare
    with, and for a recipe that differs in more than free keys.
    """
    is_finished = (resume or "").lower() == "auto" and checkpoints.is_finished(run.path)
    if run.checkpoint is None and not is_finished:
        return None
    folder = run.path if run.checkpoint is None else run.checkpoint.parent
    name = str(run.checkpoint or folder)
    if not (folder / "recipe.yaml").is_file():
        message = "there is no recipe.yaml beside it, so its learning rates, data and template are unknown"
        hint = f"copy the run's recipe.yaml into {folder}"
        raise UserError(message, code="resume-no-recipe", where=name, hint=hint)
    before, environment = load_recipe(folder / "recipe.yaml"), checkpoints.read_environment(folder)
    recipe = recipe_on(before.model)
    # `warnings` compares the processes of a sharded checkpoint.
    checkpoint = run.checkpoint
    wrote = processes if checkpoint is None or is_sharded(checkpoint) else num_processes(checkpoint)
    changes = differences(before, recipe)
    if (old := environment.get("dtype", dtype)) != dtype:
        changes["dtype"] = (old, dtype)
    batches = [_batch(side, count) for side, count in ((before, wrote), (recipe, processes))]
    if prod(batches[0]) != prod(batches[1]) or (recipe.data.streaming and wrote != processes):
        old, new = (f"{prod(batch)} ({' x '.join(map(str, batch))})" for batch in batches)
        changes["batch in total"] = old, new
    refused = {key: values for key, values in changes.items() if not may_change(key, recipe)}
    if refused:
        lines = "\n".join(
            f"  {key}: trained with {shown_value(old)}, now {shown_value(new)}" for key, (old, new) in refused.items()
        )
        command = command_line(
            "milora_vl.train", "--recipe", folder, "--output_dir", folder, "--resume_from_checkpoint", "true"
        )
        if wrote > 1:
            command = command.replace("python", f"torchrun --nproc_per_node {wrote}", 1)
        raise UserError(
            f"{name} was trained with other settings and cannot continue with these:\n{lines}",
            hint=f"to resume:           repeat the old values; {folder / 'recipe.yaml'} holds all of them:\n"
            f"                     {command}\n{NEW_RUN}",
        )
    earlier = ResumedRun(folder, run.checkpoint, is_finished, before, environment, changes)
    if earlier.gets_steps and run.checkpoint is None:
        message = "the run is finished, and it has no checkpoint to continue from"
        raise UserError(message, code="resume-no-checkpoint", where=str(folder), hint=NEW_RUN)
    return earlier


def may_change(key: str, recipe: Recipe) -> bool:
    by_evaluation = recipe.train.get("lr_scheduler_type") in SCHEDULES_BY_EVALUATION
    if OF_EVALUATION.fullmatch(key):
        return not (by_evaluation or recipe.train.get("load_best_model_at_end"))
    return MAY_CHANGE.fullmatch(key) is not None and not (recipe.data.streaming and OF_STREAM.fullmatch(key))


def schedule_has_end(recipe: Recipe) -> bool:
    """Return whether the learning rate of a step depends on the total number of steps."""
    schedule, warmup = (value_of(recipe.train, name) for name in ("lr_scheduler_type", "warmup_steps"))
    is_share = 0 < warmup < 1 and schedule in ("constant_with_warmup", "inverse_sqrt")
    return is_share or schedule not in SCHEDULES_WITHOUT_END


def shown_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _batch(recipe: Recipe, processes: int) -> tuple[int, int, int]:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    per_device, accumulation = (value_of(recipe.train, name) for name in names)
    return per_device, accumulation, processes


def environment_resumed(earlier: ResumedRun, run: RunFolder, environment: dict[str, Any]) -> dict[str, Any]:
    """Return environment.json of a resumed run: it keeps command and start time, adds times, and lists every resume."""
    assert earlier.checkpoint is not None
    known, legs = earlier.environment, earlier.environment.get("resumed", [])
    began = legs[-1]["at"] if legs else known.get("started", environment["started"])
    saved = (earlier.checkpoint / "trainer_state.json").stat().st_mtime
    # A run that was killed has written no time: what it took up to the checkpoint counts.
    killed = known.get("seconds_of_earlier", 0.0) + max(saved - datetime.fromisoformat(began).timestamp(), 0.0)
    is_same_run = earlier.folder.resolve() == run.path.resolve()
    source = earlier.checkpoint.name if is_same_run else str(earlier.checkpoint)
    entry: dict[str, Any] = {"from": source, "at": environment["started"], "command": environment["command"]}
    if earlier.changes:
        entry["changed"] = {key: list(values) for key, values in earlier.changes.items()}
    before = known.get("seconds_before_training", 0.0) + environment["seconds_before_training"]
    kept = {name: known.get(name, environment[name]) for name in ("started", "command")}
    times = {"seconds_before_training": before, "seconds_of_earlier": round(known.get("seconds") or killed, 1)}
    return {**environment, **kept, **times, "resumed": [*legs, entry]}


# What a resumed run needs beside its checkpoint, which holds A and its protection. These files describe private data
# and pictures, so they stay here: HF's Trainer pushes no name with an underscore.
TEXTS, RECORDS = "_start/texts.json", "_start/records.json"


def read_start(folder: Path, name: str) -> dict[str, Any]:
    """Return what the start of the run in `folder` has written. Raises UserError if it is missing or damaged."""
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        hint = f"copy it from the folder of the run\n{NEW_RUN}"
        raise UserError("a file of the run is missing or damaged", where=str(folder / name), hint=hint) from None


def records_content(data: RunData) -> dict[str, str]:
    """Return the content of the file RECORDS."""
    return {"records": data.keys.hex(), "pictures": data.picture_keys.hex(), "held_out": data.held_out_keys.hex()}


def require_same_records(folder: Path, data: RunData, recipe: Recipe) -> list[str]:
    """Return warnings about other held-out records that change no step, and about what a stream leaves unchecked.

    Raises UserError with the first record or picture that differs from those that the run in `folder` had.
    """
    before = read_start(folder, RECORDS)
    require_same("records", before["records"], data.keys, lambda number: data.train[number].source)
    require_same("pictures", before["pictures"], data.picture_keys, lambda number: _files(data.train)[number])
    held_out, warnings = data.evaluation or (), list[str]()
    names = lambda: [*(record.source for record in held_out), *_files(held_out)]  # noqa: E731
    try:
        if before["held_out"] and data.held_out_keys:
            require_same("held-out data", before["held_out"], data.held_out_keys, lambda number: names()[number])
    except UserError as error:
        if not may_change("data.eval_path", recipe):
            raise
        warnings = [f"{error.first.where}: {error.first.message}; held-out losses before and after are not comparable"]
    unread = f"of the stream, only the first {len(data.train):,} records and pictures were compared with the run's"
    return [*warnings, *([unread] if data.streamed else [])]


def _files(records: Iterable[Record]) -> list[str]:
    return list(map(str, dict.fromkeys(chain.from_iterable(map(files_of, records)))))


def require_same(what: str, before: str, now: bytes, name: Callable[[int], str]) -> None:
    """Raise UserError if keys differ from those of the run, in hex; `name` returns the name of a key's owner."""
    old = bytes.fromhex(before)
    had, have = len(old) // KEY_BYTES, len(now) // KEY_BYTES
    for number in range(max(had, have)):
        of_key = slice(KEY_BYTES * number, KEY_BYTES * (number + 1))
        if old[of_key] != now[of_key]:
            message = f"this is the first of the {what} that differ from those of the run"
            message += f"; it had {had:,}, now there are {have:,}" if had != have else ""
            where, hint = name(number) if number < have else "the end", f"to resume:           restore it\n{NEW_RUN}"
            raise UserError(message, code="resume-other-data", where=where, hint=hint)


def require_same_steps(checkpoint: Path, recipe: Recipe, steps: int) -> None:
    """Raise UserError if the run ends before its checkpoint, or if its schedule depends on a changed last step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))  # `choose` has read it
    planned = state.get("max_steps", steps)
    if planned != steps and schedule_has_end(recipe):
        raise UserError(
            f"the checkpoint belongs to a run of {planned:,} steps, this run has {steps:,}; the learning rates of the "
            f"{value_of(recipe.train, 'lr_scheduler_type')} schedule depend on the last step",
            where=str(checkpoint),
            hint=f"to resume:           --max_steps {planned}\n{NEW_RUN}",
        )
    if step_of(checkpoint) > steps:
        message = f"the checkpoint is beyond the end of this run, step {steps:,}"
        hint = "increase --max_steps or --num_train_epochs to continue from it"
        raise UserError(message, code="resume-beyond-end", where=str(checkpoint), hint=hint)


def require_same_checkpoint(run: Path, names: Sequence[str | None]) -> None:
    """Raise UserError if processes would resume from different checkpoints; `names` has one for each rank.

    A machine that does not see the output folder of the first one would start again while the others resume.
    """
    if len(set(names)) > 1:
        found = ", ".join(f"rank {rank}: {name or 'none'}" for rank, name in enumerate(names[:8]))
        message, hint = f"the processes find different checkpoints ({found})", "all machines must see the same folder"
        raise UserError(message, code="resume-other-checkpoints", where=str(run), hint=hint)


def resume_warnings(checkpoint: Path, *, processes: int, stage: int) -> list[str]:
    stage = 2 if stage == 1 else stage
    wrote, before = num_processes(checkpoint), zero_stage(checkpoint)
    old, new = (f"with ZeRO-{one}" if one else "without DeepSpeed" for one in (before, stage))
    if before != stage:
        message = f"the checkpoint was written {old}; this run is {new} and cannot restore the optimizer"
        hint = f"to resume:  {f'--deepspeed zero{before}' if before else 'remove --deepspeed'}"
        raise UserError(message, where=str(checkpoint), hint=hint)
    if wrote == processes:
        return []
    if stage:
        message = f"the optimizer state has one part for each of {wrote} processes, and this run has {processes}"
        hint = f"to resume:  torchrun --nproc_per_node {wrote} ..."
        raise UserError(message, where=str(checkpoint), hint=hint)
    return [
        f"{checkpoint.name} was written with {wrote} processes, now there are {processes}: the random states are "
        "initialized again, so dropout differs from an uninterrupted run"
    ]


def tasks_before(
    recipe: Recipe, base: nn.Module, targets: Sequence[Target], checkpoint: Path | None
) -> tuple[tuple[Task, ...], list[str]]:
    """Return the entries of the tasks that a run on `base`, without weights, comes after, in order, and warnings.

    A resumed run has them in its checkpoint. Raises UserError for rules that cannot train after these tasks, and for a
    base with other layers.
    """
    if recipe.after is None:
        return (), []
    if checkpoint is not None:
        saved = read_sidecar(checkpoint)
        return (() if saved is None else tuple(saved.tasks[:-1])), []
    _require_rules(recipe, Path(recipe.after), base, targets)
    tasks, warnings = _tasks_of(Path(recipe.after), recipe.template), []
    if not any(target.protect for target in targets):
        warnings.append("no rule has protect: what the earlier runs have learned is not protected (--protect 0.95)")
    return tuple(tasks), warnings


def _tasks_of(folder: Path, template: str) -> list[Task]:
    """Return the entries of a finished run: those in its milora.json, or the one of a run that came after none.

    `template` is used for an adapter without a recipe.
    """
    saved = read_sidecar(folder)
    assert saved is not None
    if saved.tasks:
        return list(saved.tasks)
    environment = read_environment(folder) or read_environment(folder.parent)  # of the run of a checkpoint
    recipe = Recipe.parse({"template": template, **recipe_of_run(folder)})
    return [task_entry(folder, recipe, saved.targets, saved.protection, environment)]


def _require_rules(recipe: Recipe, after: Path, base: nn.Module, targets: Sequence[Target]) -> None:
    """Raise UserError for a base and targets whose update cannot be added to the update of the run in `after`."""
    saved = read_sidecar(after)
    assert saved is not None
    require_layers(base, saved)
    if found := [target.path for target in (*saved.targets, *targets) if target.method == "dora"]:
        message = f"DoRA scales the rows of a weight, so its update cannot be added to another one: {found[0]}"
        raise UserError(message, where=Key.of("after"), hint=f"use another method, or merge first:\n{to_merge(after)}")
    in_full = [number for number, rule in enumerate(recipe.policy or ()) if rule.get("method") == "full"]
    where = Key(("policy", in_full[0], "method")) if in_full else Key.of("policy")
    if all(target.rank is None for target in targets):
        message = "the rules train weights in full, which changes what the earlier runs have learned"
        raise UserError(message, where=where, hint="train adapters, for example  --method milora")
    before = [target.path for target in saved.targets]
    for path in [target.path for target in targets if target.rank is None]:
        if module_path(path, before) or any(module_path(other, [path]) for other in before):
            message = f"{path} would train in full, but an earlier run has trained it: the new weight would replace it"
            hint = "give it an adapter, or leave its rule out; without a policy the run takes the earlier one's"
            raise UserError(message, where=where, hint=hint)


SHOWN, LONGEST = 2, 300  # records of the first batch, characters of a text
PACKED = 20_000  # records whose lengths decide the number of packed rows


def show(settings: Settings) -> int:
    """Print the plan of a run. Return 0, or 1 if it does not fit --gpu-memory.

    Raises UserError with everything that would stop the run.
    """
    screen = Screen(sys.stdout if settings.request.format == "human" else sys.stderr)
    run, request = make_run(settings, is_started=False), settings.request
    recipe, base = run.recipe, run.base
    for line in [*run.notes, *(f"warning: {warning}" for warning in run.warnings)]:
        screen.say(line)
    model = base.parts.describe() if base.parts else base.name
    adapter = f", with the adapter {recipe.adapter}" if recipe.adapter else ""
    adapter += f", after {recipe.after} ({amount(len(run.tasks), 'earlier task')})" if run.tasks else ""
    screen.say(f"model  {model}, {num_parameters(base.meta):,} parameters{adapter}")
    screen.say(f"run    {run.folder.path} (not created)\n")
    _show_policy(screen, run)
    problems = _missing(recipe, base)  # raised at the end, after the plan is printed
    needs = [f"the package {package}, which is not installed: {hint}" for package, _, hint in missing_packages(recipe)]
    try:
        counts, num_records, num_rows = _show_data(screen, run)
    except UserError as error:
        problems += error.problems
        counts, num_records, num_rows = _assumed(screen, recipe, "cannot be used"), None, None
    if request.recipe in llava_recipes.names():  # its own files may be missing
        files = {str(recipe.data.path): "--data_path", str(recipe.projector_weights): "--projector_weights"}
        files = {file: flag for file, flag in files.items() if flag not in request.flags.values()}
        absent = [problem for problem in problems if problem.where in files and not Path(problem.where).exists()]
        needs += [f"{problem.where}, which is not here (or {files[str(problem.where)]} FILE)" for problem in absent]
        problems = [problem for problem in problems if problem not in absent]
    run, note = run.on_records(has_pictures=recipe.data.streaming or counts.has_pictures)
    if note:
        screen.say(note)
    with collected(problems):
        read_earlier_records(run.tasks, recipe, screen, are_used=run.reads_calibration)
    batching = Batching.of(recipe, num_rows or 1, num_devices(request))
    screen.say(f"\nbatch  {batching.describe()}")
    has_steps = recipe.data.streaming or num_rows is not None
    unknown = "unknown: the data cannot be used" if recipe.data.path else "unknown without data"
    screen.say(f"steps  {batching.describe_steps() if has_steps else unknown}")
    costs = costs_of(run, counts, batching, has_steps=has_steps)
    screen.say("\n".join([*costs.lines, *(f"needs  {need}" for need in needs)]))
    if problems:
        raise UserError(problems=problems)
    title, start = _next(run, request, batching, costs)
    screen.say(f"\n{title}:\n  {start}")
    if request.format == "json":
        sizes = trained_sizes(run.targets, base.meta)
        content = {
            "model": recipe.model, "parameters": num_parameters(base.meta), "trained": sum(sizes.values()),
            "policy": [dict(zip(COLUMNS, row, strict=True)) for row in _policy_rows(run, sizes)],
            "records": num_records, "batch": batching.total, "steps": batching.steps if has_steps else None,
            "cost": costs.lines, "fits": costs.fits, "needs": needs, "output_dir": str(run.folder.path), "next": start,
        }  # fmt: skip
        sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
    return 0 if costs.fits else 1


def _next(run: Run, request: Request, batching: Batching, costs: Costs) -> tuple[str, str]:
    start = start_command(request)
    if run.recipe.data.path is None:
        start += " --data_path DATA.json" + (" --image_folder FOLDER" if run.base.reads_pictures else "")
    start += f" {costs.change}" if costs.change else ""
    if batching.num_devices > 1 and request.output_dir is None:
        start += " --output_dir FOLDER"  # the default name holds the time, which differs between processes
    how = {"": "to start it", None: "to start it on a device where it fits"}
    return how.get(costs.change, "to start it so that it fits"), start


def _missing(recipe: Recipe, base: Base) -> list[Problem]:
    problems: list[Problem] = []
    try:
        require_usable(recipe, base)
    except UserError as error:
        # The plan of a named model needs only its config; `_show_data` says that the processor is not here.
        if not (_is_absent(error) and base.own_pictures):
            problems += error.problems
    with collected(problems):
        if recipe.data.path is None and not base.own_pictures:
            _collator(recipe, base)  # its template
    with collected(problems):
        require_evaluation(recipe)
    return problems


def _is_absent(error: UserError) -> bool:
    return error.first.code == "model-not-available"


def _policy_rows(run: Run, sizes: dict[str, int]) -> list[tuple[str, ...]]:
    return policy_rows(run.recipe.policy or [], run.targets, sizes, run.base.meta)


def _show_policy(screen: Screen, run: Run) -> None:
    base, targets = run.base.meta, run.targets
    sizes = trained_sizes(targets, base)
    show_policy(screen, _policy_rows(run, sizes), frozen_towers(base, targets))
    adapters = sum(sizes[t.path] for t in targets if t.rank is not None)
    full = sum(sizes.values()) - adapters
    copies = full if adapters else 0  # PEFT keeps the original beside a module that trains in full
    screen.say(trainable_line(adapters + full, num_parameters(base) + adapters + copies))
    screen.say(f"adapters {adapters:,}, in full {full:,}")


def _show_data(screen: Screen, run: Run) -> tuple[Counts, int | None, int | None]:
    """Check and show the records. Return the tokens per record or row, and the numbers of records and of rows.

    The numbers are unknown (None) for a stream, and if no data is named.
    """
    recipe, base = run.recipe, run.base
    if recipe.data.path is None:
        return _assumed(screen, recipe, "none yet (--data_path)"), None, None
    read = data.read_records(recipe.data)
    number = None if read.streamed else len(read.train)
    found = read.describe()
    try:
        collate = _collator(recipe, base)
    except UserError as error:
        if not _is_absent(error):
            raise
        collate = None
    if collate is None:
        counts = _assumed(screen, recipe, f"{found}, not checked: the tokenizer of {recipe.model} is not here")
        return counts, number, None if number is None else max(round(number / counts.records), 1)
    data.check(collate, recipe, read)
    first = list(read.train[: value_of(recipe.train, "per_device_train_batch_size")])
    if recipe.data.bad_images != "raise":  # the run leaves out the others
        first = data.usable(collate, read.train[: data.FIRST])[: len(first)]
    tokens, supervised = (sum(map(count, first)) / len(first) for count in (collate.num_tokens, collate.num_supervised))
    screen.say(f"\ndata   {found}")
    line = f"{tokens:,.0f} tokens per record, {supervised:,.0f} of them supervised"
    screen.say(f"first batch: {amount(len(first), 'record')}, {line}   (> supervised, . not supervised)")
    for line in _first_batch(first, collate, base.tokens_of_a_picture):
        screen.say(line)
    has_pictures = any(record.images for record in read.train)
    counts = Counts(tokens, supervised, has_pictures=has_pictures)
    if not recipe.data.packing or number is None:
        return counts, number, number
    every = -(-number // PACKED)
    sample = read.train[::every]
    lengths = data.lengths(recipe, collate, sample)
    assert lengths is not None
    rows, summary = data.packed(recipe, sample, lengths)
    screen.say(summary if every == 1 else f"about {every} times: {summary}")
    per_row = len(sample) / len(rows)
    packed = Counts(2 * recipe.data.max_length, supervised * per_row, per_row, has_pictures)
    return packed, number, len(rows) * every


def _collator(recipe: Recipe, base: Base) -> RecordCollator[Any] | None:
    """Return the collator of the run; None if the tokenizer of a LLaVA or of a text model is not on this machine."""
    processor = base.processor if base.own_pictures else _tokenizer_at_hand(base.name)
    if processor is None:
        return None
    if recipe.template == OWN and base.parts is not None:  # a composed base has no chat template
        recipe = recipe.model_copy(update={"template": "vicuna_v1"})
    return data.strict_collator(recipe, base, processor)


def _assumed(screen: Screen, recipe: Recipe, why: str) -> Counts:
    """Return assumed tokens per record, as in LLaVA's mix665k, if no record can be counted."""
    longest = recipe.data.max_length
    counts = Counts(min(MIX665K.tokens, longest), min(MIX665K.supervised, longest))
    screen.say(f"\ndata   {why}; counts below assume records of {counts.tokens:,} tokens (LLaVA's mix665k)")
    if not recipe.data.packing:
        return counts
    records = 2 * longest / counts.tokens
    screen.say(f"packed into rows of {2 * longest:,} tokens, about {records:.3g} records each")
    return Counts(2 * longest, counts.supervised * records, records)


def _first_batch(records: Sequence[Record], collate: RecordCollator[Any], image_tokens: int) -> list[str]:
    """Return the first records as text, one line per segment: `>` marks supervised text, `.` other text.

    `image_tokens` is the number of tokens of an image, or 0 where it depends on the image.
    """
    out = []
    for record in records[:SHOWN]:
        out.append(f"{record.source or record.id}  {' '.join(map(str, record.images)) or '(no image)'}")
        for supervised, pieces in groupby(collate.segments(record), attrgetter("supervised")):
            text = "".join(piece.text for piece in pieces).replace("\n", "\\n")
            text = text.replace(IMAGE, f"<image x {image_tokens}>" if image_tokens else IMAGE)
            more = f" ... ({len(text):,} characters)" if len(text) > LONGEST else ""
            out.append(f"  {'>' if supervised else '.'} {text[:LONGEST]}{more}")
    return out


def _tokenizer_at_hand(name: str) -> Any | None:
    source = name if Path(name).is_dir() else hub_id(name)
    if name in BUILT_IN_MODELS:
        source = str(folder_of(name))
    for auto in (AutoProcessor, AutoTokenizer):  # the processor may hold the chat template
        try:
            loaded = auto.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):
            continue
        tokenizer, pictures = split_processor(loaded)
        if pictures is not None:
            share_template(loaded)
        return tokenizer
    return None


def start_command(request: Request) -> str:
    words, planned = [], ("--dry-run", "--devices", "--gpu-memory", "--format")
    for word, before in zip(request.words, ("", *request.words), strict=False):
        name, is_value = word.replace("_", "-").split("=")[0], not word.startswith("-")
        if name not in planned and not (is_value and before.replace("_", "-") in planned):
            words.append(word)
    fewest = 2 if request.overrides.get("train", {}).get("fsdp") else 1  # FSDP2 needs several processes
    return f"{_launcher(max(request.devices or 1, fewest))} {shlex.join(words)}"


def _launcher(devices: int) -> str:
    if devices == 1:
        return PROG
    nodes = devices // 8 if devices > 8 and devices % 8 == 0 else 1
    several = f"--nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint HOST:29500 " if nodes > 1 else ""
    return f"torchrun {several}--nproc_per_node {devices // nodes} -m {PROG.split()[-1]}"
