"""`Run`: all that can be known of a run before data and weights load, for a training and for its dry run.

Each check stands beside the code that it protects; `make_run` calls them in a row.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AttentionInterface, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from milora_data.batches.pack import require_packable
from milora_data.encode.templates import OWN, no_videos
from milora_vl.common.cli.console import amount, beside, did_you_mean, require_folder, suggest
from milora_vl.common.errors import Key, Problem, UserError, at_flag, collected, first_line
from milora_vl.common.evaluator import QuestionSet, evaluator
from milora_vl.common.yaml_text import read_file
from milora_vl.core.adapter import checkpoints
from milora_vl.core.policy import Policy, PolicyError, Target
from milora_vl.core.policy.resolve import RankTooLarge
from milora_vl.core.policy.rules import FULL_PROJECTOR, UNALIGNED_PROJECTOR, RuleDict, without_projector
from milora_vl.core.policy.towers import find_towers
from milora_vl.models import loading, smol_llava
from milora_vl.models import parts as composing
from milora_vl.models.base import Base, find_base
from milora_vl.models.devices import fastest_dtype, quantized_layers, train_device
from milora_vl.models.parts import Parts
from milora_vl.models.processors import configure_processor, usable_inputs
from milora_vl.models.projector import projector_file
from milora_vl.report.repeat import is_file
from milora_vl.train import arguments, folder, inherit, resume
from milora_vl.train.arguments import Derived, Launch, read_launch, require_processes_for_fsdp, value_of
from milora_vl.train.flags import Request
from milora_vl.train.folder import RunFolder
from milora_vl.train.merge import Settings
from milora_vl.train.recipe import BaseKLConfig, CalibrationConfig, PartsConfig, Recipe

# Name of the feature selection in LLaVA -> in Hugging Face.
FEATURES = {"patch": "default", "cls_patch": "full"}
SMALL, SMALL_RATE = 1e9, 1e-3  # parameters of a small model, and the rate that it wants: docs/choose.md
FLASH_PACKAGES = {f"flash_attention_{n}": f"flash-attn-{n}".removesuffix("-2") for n in (2, 3, 4)}
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
    earlier: resume.Earlier | None  # the run that it resumes
    started: datetime
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    tasks: tuple[inherit.Task, ...] = ()  # that the run comes after

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
    recipe, token = _without_token(with_dtype(recipe, request))
    path = Path(request.output_dir) if request.output_dir else folder.default_path(recipe, started)
    run_folder = folder.choose(path, request.resume)
    tasks, notes = inherit.tasks_before(recipe, base.meta, targets, run_folder.checkpoint)
    launch = read_launch(recipe.train)
    require_installed(recipe, is_started=is_started)
    derived = arguments.derive(recipe, base, targets, launch)
    arguments.check(recipe, targets, derived, launch)
    if is_started:
        require_processes_for_fsdp(recipe.train)
    args = arguments.build(derived.train, path, is_started=is_started)
    dtype, devices = arguments.dtype_name(recipe), num_devices(request)
    earlier = resume.read_earlier(run_folder, request.resume, partial(_as_composed, recipe, base), dtype, devices)
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


def num_devices(request: Request) -> int:
    return request.devices or int(os.environ.get("WORLD_SIZE", "1"))


def _without_token(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Return the recipe without its hub_token, and the token: run folders are shared, so they must not hold it."""
    train = dict(recipe.train)
    token = train.pop("hub_token", None)
    return recipe.model_copy(update={"train": train}), token


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
            rules, notes = _default_rules(settings, base)
            recipe = recipe.model_copy(update={"policy": rules})
        targets = Policy.parse(recipe.policy or []).resolve(base.meta)
    if base.own_pictures and "template" not in settings.is_set:
        recipe = recipe.model_copy(update={"template": OWN})
    for check in (_check_pictures, _check_base_kl, _check_calibration, _check_quantization):
        with collected(problems):
            check(recipe, base, targets)
    if problems:
        raise UserError(problems=problems)
    return recipe, base, targets, [*notes, *_warnings(recipe, base, targets)]


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


def _default_rules(settings: Settings, base: Base) -> tuple[list[RuleDict], list[str]]:
    """Return the default rules as they fit a base, after the flags, and notes about what is not as usual."""
    recipe, edits, notes = settings.recipe, settings.request.edits, list[str]()
    rules = list(recipe.policy or [])
    projector = find_towers(base.meta).projector
    rate = {} if edits.mm_projector_lr is None else {"learning_rate": edits.mm_projector_lr}
    if projector is None:
        if rate:
            hint = "remove the flag"
            raise UserError(
                f"{base.name} has no projector", code="flag-no-effect", where="--mm_projector_lr", hint=hint
            )
        rules = without_projector(rules)
    elif recipe.projector_weights:
        rules = [*without_projector(rules), FULL_PROJECTOR | rate]
        notes.append(
            "the base does not hold the projector of  --projector_weights, so it trains in full and unprotected, and "
            "the adapter holds it"
        )
    elif base.parts is not None:
        rules = [*without_projector(rules), UNALIGNED_PROJECTOR | rate]
        notes.append(
            "the projector has never been aligned, so it trains in full and unprotected; align it first with  "
            "--recipe pretrain-projector-llava, then pass  --projector_weights"
        )
    elif not _takes_adapter("projector", base):
        rules = [*without_projector(rules), FULL_PROJECTOR | rate]
        notes.append("the projector has no linear layers, so it trains in full and unprotected")
    if edits.rank is None:
        try:
            Policy.parse(rules).resolve(base.meta)
        except PolicyError as error:
            largest = [problem.largest for problem in error.problems if isinstance(problem, RankTooLarge)]
            if largest:
                rank = max(1, min(largest) // 2)
                rules = [{**rule, "rank": rank, "alpha": rank} if "rank" in rule else rule for rule in rules]
                notes.append(f"the smallest matrix of this model has rank {min(largest)}: the ranks are {rank}")
    return rules, notes


def _takes_adapter(modules: str, base: Base) -> bool:
    try:
        return bool(Policy.parse([{"modules": modules, "method": "lora", "rank": 1}]).resolve(base.meta))
    except PolicyError:
        return False


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
    for key in data.processor.of_videos:
        with at_flag(Key.of(f"data.{key}")):
            raise no_videos(name)
    if (ratio == "anyres" and tiling is None) or (ratio == "plain" and tiling is not None):
        message = f"{ratio}, but {name} {'sees a picture once' if tiling is None else 'tiles its pictures'}"
        where, hint = Key.of("data.image_aspect_ratio"), "use pad or plain" if tiling is None else "use anyres"
        raise UserError(message, code="image-aspect-ratio", where=where, hint=hint)


def _check_base_kl(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    """Raise UserError if `base_kl` has no base to compare with: the training changes it."""
    if recipe.base_kl.weight and targets and all(target.rank is None for target in targets):
        message, hint = (
            "compares with the base, which this training changes",
            "train an adapter, or set the weight to 0",
        )
        raise UserError(message, code="base-kl-needs-base", where=Key.of("base_kl.weight"), hint=hint)


def _check_calibration(recipe: Recipe, base: Base, targets: Sequence[Target]) -> None:
    calibration = recipe.calibration
    files = [("text", name) for name in calibration.text or []]
    files += [(key, name) for key in ("data", "earlier") if (name := getattr(calibration, key))]
    for key, name in files:
        if not Path(name).exists() and not name.startswith("hub:"):
            where = Key(("calibration", key))
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


def _warnings(recipe: Recipe, base: Base, targets: Sequence[Target]) -> list[str]:
    messages = _tower_warnings(recipe.parts, base)
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


def _tower_warnings(named: PartsConfig, base: Base) -> list[str]:
    """Return warnings about settings without effect: a model that reads images keeps its own vision tower."""
    if named == PartsConfig() or base.parts is not None:
        return []
    if not base.reads_pictures:
        return ["the flags about the vision layer have no effect without --vision_tower"]
    values = base.config.to_dict()
    differing = []
    if named.vision_tower and not _is_tower(base.config, named.vision_tower):
        differing.append(named.vision_tower)
    if values.get("vision_feature_layer", named.select_layer) != named.select_layer:
        differing.append(f"layer {named.select_layer}")
    if values.get("vision_feature_select_strategy", "default") != FEATURES[named.select_feature]:
        differing.append(f"feature {named.select_feature}")
    if not differing:
        return []
    return [f"{base.name} keeps the vision tower that it was trained with; no effect: {', '.join(differing)}"]


def _is_tower(config: Any, name: str) -> bool:
    """Return whether a named tower has the shape of the model's tower. The weights always come from the model."""
    try:
        other = loading.config_of(name)
    except UserError:  # the run does not need this tower
        return False
    sizes = ("model_type", "hidden_size", "image_size", "patch_size", "num_hidden_layers")
    tower, named = config.vision_config.to_dict(), other.to_dict()
    return all(tower.get(size) == named.get(size) for size in sizes)


def with_rates(targets: Sequence[Target], train: Mapping[str, Any]) -> list[Target]:
    decay = value_of(train, "weight_decay")
    return [
        replace(
            target,
            learning_rate=target.learning_rate or arguments.default_rate(train, target.method),
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


def require_installed(recipe: Recipe, *, is_started: bool) -> None:
    """Raise UserError for a missing package that a plan needs too, or (`is_started`) the run alone."""
    train = recipe.train
    for package, key, hint in missing_packages(recipe) if is_started else ():
        message = f"the package {package} is not installed"
        raise UserError(message, code="package-missing", where=Key.of(key), hint=hint)
    known = ["eager", *(name for name in AttentionInterface().valid_keys() if "|" not in name)]
    for name in {recipe.attention_of("language"), recipe.attention_of("vision")}:
        if name not in known and "/" not in name:  # OWNER/NAME is a kernel of the hub
            message = f"unknown attention implementation {name!r}; transformers knows {', '.join(sorted(known))}"
            hint = did_you_mean(suggest(name, known)) or "use sdpa"
            raise UserError(message, where=Key.of("attn_implementation"), hint=hint)
        package = "kernels" if "/" in name else FLASH_PACKAGES.get(name, "torch")
        if not (_is_installed(package) or _is_installed("kernels")):
            message = f"{name} needs the package {package}, which is not installed"
            hint = f"pip install {package}, or pip install kernels, or --attn_implementation sdpa"
            raise UserError(message, code="package-missing", where=Key.of("attn_implementation"), hint=hint)
    named = train.get("report_to") or []
    trackers = [name for name in ([named] if isinstance(named, str) else named) if name not in ("all", "none")]
    try:
        for callback in get_reporting_integration_callbacks(trackers):  # it looks for its package
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        hint = "install it, or use --report_to none: report.html shows the losses"
        where = Key.of("train.report_to")
        raise UserError(first_line(error), code="tracker-unavailable", where=where, hint=hint) from None


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def require_usable(recipe: Recipe, base: Base) -> None:
    """Raise UserError, before any weights load, if a part is missing or pictures cannot be prepared for the model.

    The processor of the base then follows the recipe.
    """
    if recipe.factor_cache:  # a complete cache may be on a disk that is read-only
        require_folder(Path(recipe.factor_cache), Key.of("factor_cache"), is_written=False)
    if base.own_pictures:
        configure_processor(base.processor, recipe.data.processor)
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
    for suite, data in suites_of(recipe).items():
        questions = QuestionSet(suite, data)
        evaluator().require_questions(questions, at=Key.of("eval.suites"), data_at=Key.of("eval.data"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """What decides the number of steps, counted as HF's Trainer counts them. With `max_steps` -1 the epochs decide."""

    num_records: int | None  # of what a batch consists of; None: a stream
    per_device: int
    accumulation: int = 1
    num_devices: int = 1
    epochs: float = 3.0
    max_steps: int = -1
    drop_last: bool = False
    unit: Literal["record", "packed row"] = "record"

    @classmethod
    def of(cls, recipe: Recipe, num_records: int | None, num_devices: int) -> Batching:
        train = recipe.train
        return cls(
            num_records=None if recipe.data.streaming else num_records,
            per_device=value_of(train, "per_device_train_batch_size"),
            accumulation=value_of(train, "gradient_accumulation_steps"),
            num_devices=num_devices,
            epochs=value_of(train, "num_train_epochs"),
            max_steps=value_of(train, "max_steps"),
            drop_last=value_of(train, "dataloader_drop_last"),
            unit="packed row" if recipe.data.packing else "record",
        )

    @property
    def total(self) -> int:
        """Return the records, or packed rows, per optimizer step over all devices."""
        return self.per_device * self.accumulation * self.num_devices

    @property
    def steps_per_epoch(self) -> int:
        if self.num_records is None:
            return self.max_steps
        round_ = math.floor if self.drop_last else math.ceil
        batches = round_(self.num_records / (self.per_device * self.num_devices))
        return max(batches // self.accumulation + (batches % self.accumulation > 0), 1)

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the whole run.

        >>> Batching(num_records=665_298, per_device=16, num_devices=8, epochs=1).steps
        5198
        """
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch)

    def describe(self) -> str:
        devices = f"{self.num_devices} device{'s' if self.num_devices > 1 else ''}"
        return f"{self.per_device} x {self.accumulation} accumulation x {devices} = {self.total}"

    def describe_steps(self) -> str:
        if self.num_records is None:
            return f"{self.steps:,} ({amount(self.steps * self.total, self.unit)} of a stream)"
        epochs = f"{self.steps / self.steps_per_epoch:.3g}"
        return f"{self.steps:,} ({epochs} epoch{'' if epochs == '1' else 's'} of {amount(self.num_records, self.unit)})"
