"""`Run`: all that can be known of a run before data and weights load, for a training and for its dry run.

Each check is beside the code that it protects; `make_run` calls them in a row. `show` prints the dry run. When a
run resumes, the optimizer, the schedule and the factors come from the checkpoint: only the keys of MAY_CHANGE differ.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import llava_recipes
from milora_data.batches.pack import require_packable
from milora_data.batches.record_collator import RecordCollator
from milora_data.encode.templates import OWN, no_videos
from milora_data.records.record import IMAGE, Record
from milora_vl.common.cli.console import amount, duration_text
from milora_vl.common.cli.screen import Screen
from milora_vl.common.cli.table import drawn
from milora_vl.common.errors import Key, Problem, UserError, at_flag, beside, collected
from milora_vl.core.adapter.sidecar import read_sidecar, require_layers
from milora_vl.core.calibration.texts import LENGTH
from milora_vl.core.policy import Policy, Target
from milora_vl.core.policy.resolve import frozen_towers, policy_rows
from milora_vl.models import loading
from milora_vl.models.base import Base, Parts, find_base, require_weights, tokenizer_at_hand
from milora_vl.models.devices import bytes_per_number, measured_flops, quantized_layers
from milora_vl.models.memory_plan import GIB, Workload, flops_per_step, host_memory, memory, size_text, verdict
from milora_vl.train import data
from milora_vl.train.counts import (
    A100,
    A100_FLOPS,
    CPU,
    MIX665K,
    SMALL_MODEL,
    SMOKE_NOTE,
    SMOKE_STEPS,
    Batching,
    Counts,
    num_devices,
    num_parameters,
    start_seconds,
    trained_sizes,
    workload_of,
)
from milora_vl.train.data import processor_settings, require_evaluation, require_usable
from milora_vl.train.default_policy import default_rules
from milora_vl.train.join_settings import Settings
from milora_vl.train.launch import Launch, hf_arguments, launch_of, missing_packages
from milora_vl.train.resume import (
    Entry,
    ResumedRun,
    RunFolder,
    choose_folder,
    read_earlier_records,
    read_resumed,
    tasks_before,
)
from milora_vl.train.settings import (
    RENAMED,
    BaseKLConfig,
    CalibrationConfig,
    PartsConfig,
    Recipe,
    Request,
    value_of,
    with_rates,
    without_unseen_projector,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run that nothing is known to stop: what trains on which base, in which folder, and what it continues."""

    request: Request
    recipe: Recipe  # as it fits the base, without the hub's token
    base: Base
    targets: tuple[Target, ...]  # with the learning rates of the run
    launch: Launch
    args: TrainingArguments
    hub_token: str | None
    folder: RunFolder
    earlier: ResumedRun | None  # the run that it resumes
    started: datetime
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    tasks: tuple[Entry, ...] = ()  # that the run comes after

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

    def is_smoke_test(self, steps: int) -> bool:
        return self.reads_calibration and steps < SMOKE_STEPS

    def start_seconds(self, steps: int, flops: float | None, row: float) -> float:
        """Return about the seconds before the first of `steps` steps; see `counts.start_seconds`."""
        is_new = self.folder.checkpoint is None and self.recipe.adapter is None
        return start_seconds(
            self.base,
            self.targets if is_new else (),
            self.recipe.calibration if self.reads_calibration else None,
            num_tasks=len(self.tasks),
            steps=steps,
            devices=num_devices(self.request),
            stage=self.launch.zero_stage,
            flops=flops,
            row=row,
        )

    def composed(self) -> tuple[Run, str]:
        """Return the run on a base that exists, composed of its parts at first use, and a log line.

        If several processes call this, one of them composes the base.
        """
        parts = self.base.parts
        if parts is None:
            loading.prepare(self.recipe.model)
            return self, ""
        path, is_new = loading.base_folder(parts)
        done = "composed" if is_new else "composed before"
        line = f"base {path}, {done} from {parts.describe()}; the adapter refers to it"
        return replace(self, recipe=_on_composed(self.recipe, path), base=find_base(str(path))), line


def make_run(settings: Settings, *, is_started: bool) -> Run:
    """Check everything that can be checked without data and weights. A plan (not `is_started`) starts no process."""
    request, started = settings.request, datetime.now().astimezone()
    recipe, base, targets, warnings = fit(settings)
    token = recipe.train.get("hub_token")  # run folders are shared, so they must not hold it
    train = {name: value for name, value in recipe.train.items() if name != "hub_token"}
    recipe = recipe.model_copy(update={"train": train})
    path = Path(request.output_dir) if request.output_dir else default_folder(recipe, started)
    launch = launch_of(recipe, base, targets, request, is_started=is_started)
    args = hf_arguments(launch.train, path, is_started=is_started)
    if recipe.dtype == "fastest":
        recipe = recipe.model_copy(update={"dtype": launch.dtype_name})
    folder = choose_folder(path, request.resume)
    tasks, notes = tasks_before(recipe, targets, folder.checkpoint)
    devices, on_base = num_devices(request), partial(_as_composed, recipe, base)
    earlier = read_resumed(folder, request.resume, on_base, launch.dtype_name, devices)
    warnings += [*notes, *launch.warnings]
    if is_started and args.world_size == 1 and args.device.type == "cuda" and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        command = f"torchrun --nproc_per_node {count} -m milora_vl.train ..."
        warnings.append(f"this run uses one of {count} GPUs; to use all: {command}")
    return Run(
        request=request,
        recipe=recipe,
        base=base,
        targets=tuple(targets),
        launch=launch,
        args=args,
        hub_token=token,
        folder=folder,
        earlier=earlier,
        started=started,
        notes=tuple(settings.notes),
        warnings=tuple(warnings),
        tasks=tasks,
    )


def default_folder(recipe: Recipe, now: datetime) -> Path:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = "a run on several devices needs --output_dir"
        raise UserError(message, code="flag-required", where="--output_dir", hint="add:  --output_dir FOLDER")
    first = (recipe.policy or [{}])[0]
    rank = first.get("rank")
    method = str(first.get("method", "milora")) + (f"-r{rank}" if isinstance(rank, int) else "")
    return Path("runs") / Path(recipe.model).name / method / now.strftime("%Y-%m-%d_%H%M%S")


def fit(settings: Settings) -> tuple[Recipe, Base, list[Target], list[str]]:
    recipe, problems, targets, notes = settings.recipe, list[Problem](), list[Target](), list[str]()
    with at_flag(Key.of("model")):
        base = _base_of_run(recipe)
    for flag, earlier in (("--after", recipe.after), ("--adapter", recipe.adapter)):
        if earlier is not None and (saved := read_sidecar(Path(earlier))):
            with at_flag(flag):
                require_layers(base.meta, saved)  # before its rules are matched with another model
                require_weights(base, saved)
    with collected(problems):
        if "policy" not in settings.is_set:
            rules, notes = default_rules(settings, base)
            recipe = recipe.model_copy(update={"policy": rules})
        targets = Policy.parse(recipe.policy or []).resolve(base.meta)
        targets = with_rates(targets, recipe.train)
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
    tower, weights, source = named.vision_tower, named.vision_weights, recipe.projector_weights
    layer, feature = named.select_layer, named.select_feature
    parts = None if tower is None else Parts(recipe.model, tower, source, layer, feature, weights)
    return find_base(recipe.model, parts)


def _on_composed(recipe: Recipe, path: Path) -> Recipe:
    return recipe.model_copy(update={"model": str(path), "parts": PartsConfig(), "projector_weights": None})


def _as_composed(recipe: Recipe, base: Base, model: str) -> Recipe:
    """Return the recipe as an earlier run has it: on its composed base `model`, if that one has the same parts."""
    is_same = base.parts is not None and loading.planned_folder(base.parts).name == Path(model).name
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
        raise no_videos(name, Key(("data", key)))
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


COLUMNS = ("modules", "number", "method", "rank", "alpha", "parameters", "rate", "energy", "trains")


def show_policy(screen: Screen, rows: Sequence[tuple[str, ...]], frozen: Sequence[str]) -> None:
    cells = [row[:-1] for row in rows] + [(tower, "-", "frozen", *[""] * 5) for tower in frozen]
    drawn(screen.console, COLUMNS[:-1], cells, left=("modules", "method"))
    for modules, *_, trains in rows:
        screen.say(f"{modules}: {trains}")


def trainable_line(trained: int, total: int) -> str:
    """Return PEFT's line about trained parameters, word for word, because users grep it.

    >>> trainable_line(1, 8)
    'trainable params: 1 || all params: 8 || trainable%: 12.5000'
    """
    return f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}"


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of a run as lines to print, and whether it fits in the memory of --gpu-memory."""

    lines: list[str]
    fits: bool


def costs_of(run: Run, counts: Counts, batching: Batching, *, has_steps: bool) -> Costs:
    base, request = run.base, run.request
    work = _work_of(run, counts, batching)
    frugal = [flag for flag, has in (("bf16", work.half), ("gradient_checkpointing", work.checkpointing)) if not has]
    flags = " ".join(f"--{flag} True" for flag in frugal)
    lean = _work_of(run, counts, batching, *frugal) if frugal else work
    sizes, leanest = memory(work), sum(memory(lean).values())
    whole = sum(sizes.values())
    stage = "FSDP2" if work.fsdp else f"ZeRO-{work.stage}" if work.stage else "no ZeRO"
    line = f"memory about {size_text(whole)} per device ({stage}, {amount(work.devices, 'device')})"
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items() if size >= 0.05 * GIB)
    out = [f"{line}: {parts}" if parts else line]
    if base.own_pictures:
        out.append("       and the activations of the vision tower, which depend on the sizes of the pictures")
    if host_memory(work):
        out.append(f"       and {host_memory(work) / GIB:.1f} GiB of host memory per device (offloaded)")
    if leanest < min(0.9 * whole, whole - 0.05 * GIB):
        out.append(f"       with {flags} about {size_text(leanest)}")
    fits = True
    if request.gpu_memory is not None:
        lines, fits = verdict(work, lean, flags, request.gpu_memory)
        out += lines
    is_planned = request.devices is not None or request.gpu_memory is not None
    on_cpu = work.total < SMALL_MODEL and not torch.cuda.is_available() and not is_planned
    flops, where = (measured_flops(), CPU) if on_cpu else (A100_FLOPS, A100)
    step = flops_per_step(work) / flops
    total = f", {duration_text(batching.steps * step)} in total" if has_steps else ""
    steps = batching.steps if has_steps else SMOKE_STEPS
    start = run.start_seconds(steps, flops if on_cpu else None, work.tokens if counts.has_pictures else 0)
    before = f", about {duration_text(start)} before the first" if start else ""
    out += [f"time   about {duration_text(step)} a step on {where}{total}{before}"]
    if run.is_smoke_test(steps):
        out.append(SMOKE_NOTE)
    if work.base_kl:
        share = flops_per_step(work) / flops_per_step(replace(work, base_kl=0.0)) - 1
        room = whole - sum(memory(replace(work, base_kl_activations=0.0)).values())
        texts, every = amount(run.base_kl.texts, "text"), run.base_kl.every
        price = f"{share * every:.0%} more time in that step, {share:.0%} in all"
        out.append(f"base_kl  reads {texts} in one step of {every}: {price}, {room / GIB:.1f} GiB")
    return Costs(out, fits)


def _work_of(run: Run, counts: Counts, batching: Batching, *frugal: str) -> Workload:
    """Return the work of a run, also with the flags `frugal`.

    Texts and captions of `base_kl` take turns. A caption has its picture, and about 80 tokens of system text, question
    and answer. Records of earlier tasks are as long as this run's.
    """
    base, term, recipe = run.base, run.base_kl, run.recipe
    train = {**run.launch.train, **{RENAMED.get(name, name): True for name in frugal}}
    work = workload_of(replace(run.launch, train=train), base, run.targets, counts, batching)
    if recipe.quantization != "none":
        work = replace(work, packed_bytes=bytes_per_number(recipe.quantization))
    saved = None if recipe.after is None else read_sidecar(Path(recipe.after))
    earlier = () if saved is None else saved.targets  # the base holds their factors
    held = sum((t.rank or 0) * (2 if t.has_anchor else 1) * sum(t.shape) for t in earlier)
    work = replace(work, fixed=work.fixed + held)
    if not term.weight:
        return work
    longest = of_text = max(LENGTH, work.tokens if recipe.after else 0)
    if base.reads_pictures and recipe.calibration.num_pictures and counts.has_pictures:
        largest = base.tokens_of_a_picture if base.tiling is None else base.tiling.most_tokens
        longest = max(longest, (largest or work.tokens) + 80)
    # In proportion; and logits and probabilities of the model and of the base in float32, with their gradients.
    in_proportion = work.activations * term.texts * longest / (work.records * work.tokens)
    extra = in_proportion + 5 * 4 * term.texts * of_text * base.config.get_text_config().vocab_size
    return replace(work, base_kl=term.texts * (LENGTH + longest) / 2 / term.every, base_kl_activations=extra)


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
    has_pictures = recipe.data.streaming or counts.has_pictures
    targets, note = without_unseen_projector(run.targets, recipe, has_pictures=has_pictures)
    run = replace(run, targets=targets)
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
    if request.format == "json":
        sizes = trained_sizes(run.targets, base.meta)
        content = {
            "model": recipe.model, "parameters": num_parameters(base.meta), "trained": sum(sizes.values()),
            "policy": [dict(zip(COLUMNS, row, strict=True)) for row in _policy_rows(run, sizes)],
            "records": num_records, "batch": batching.total, "steps": batching.steps if has_steps else None,
            "cost": costs.lines, "fits": costs.fits, "needs": needs, "output_dir": str(run.folder.path),
        }  # fmt: skip
        sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
    return 0 if costs.fits else 1


def _missing(recipe: Recipe, base: Base) -> list[Problem]:
    problems: list[Problem] = []
    try:
        require_usable(recipe, base)
    except UserError as error:
        # The plan of a named model needs only its config; `_show_data` says that the processor is not here.
        if not (error.first.code == "model-not-available" and base.own_pictures):
            problems += error.problems
    with collected(problems):
        if recipe.data.path is None and not base.own_pictures:
            _collator(recipe, base)  # its template
    with collected(problems):
        require_evaluation(recipe)
    return problems


def _policy_rows(run: Run, sizes: dict[str, int]) -> list[tuple[str, ...]]:
    return policy_rows(run.recipe.policy or [], run.targets, sizes, run.base.meta, {})


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
    for warning in read.warnings():
        screen.warn(warning)
    number = None if read.streamed else len(read.train)
    found = read.describe()
    try:
        collate = _collator(recipe, base)
    except UserError as error:
        if error.first.code != "model-not-available":
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
    processor = base.processor if base.own_pictures else tokenizer_at_hand(base.name)
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
