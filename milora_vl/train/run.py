"""One training run from its request to its report: `train` calls the steps in order; each returns a complete value.

request -> plan -> inputs -> loaded base -> ordered rows -> adapted model -> trained files -> report.

What can be wrong is found before the model loads. Only caches are written before the first step begins.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from milora_data.batches.collate import ImageTextCollator
from milora_data.encode.templates import OWN, no_tools
from milora_vl.common.cli.command_line import command_line
from milora_vl.common.errors import UserError, with_context
from milora_vl.core.adapter import checkpoints
from milora_vl.core.adapter.checkpoints import WEIGHTS, step_of
from milora_vl.core.adapter.folders import has_config, holds_projector_alone, holds_text_model
from milora_vl.core.weights.distributed import gather
from milora_vl.models.base import Base
from milora_vl.report import model_card
from milora_vl.report.page import try_write_report
from milora_vl.train import (
    calibration_batches,
    collators,
    failures,
    features,
    hub,
    loaders,
    model,
    run_files,
    training_arguments,
)
from milora_vl.train.evaluation import Scored, SuiteCallback, suites_of
from milora_vl.train.forgetting import ForgettingCallback, Probe
from milora_vl.train.keep import Kept
from milora_vl.train.model import Built
from milora_vl.train.plan import eval_section, rates, record_checks, resuming, run_data
from milora_vl.train.plan.base import compose, require_usable
from milora_vl.train.plan.batching import Batching
from milora_vl.train.plan.fit import template_warnings
from milora_vl.train.plan.plan import Plan, make_plan
from milora_vl.train.plan.run_data import RunData
from milora_vl.train.plan.run_folder import CARD, ENVIRONMENT, RunFolder
from milora_vl.train.plan.screen import Screen, policy_rows, protection_lines, trainable_line
from milora_vl.train.plan.train_section import base_dtype, refused
from milora_vl.train.recipe.command_line import Request
from milora_vl.train.recipe.merge import merge_recipe
from milora_vl.train.recipe.schema import Recipe
from milora_vl.train.run_files import AtFirstStep, FirstFiles
from milora_vl.train.spectrum import layer_spectra
from milora_vl.train.trainer import MiloraTrainer, calls_on_sigterm

if TYPE_CHECKING:
    from transformers import TrainingArguments


def train(request: Request) -> int:
    """Run a training from its request to its report. Returns the exit code."""
    start, screen = time.monotonic(), Screen()
    merged = merge_recipe(request)
    plan = make_plan(request, merged, processes=int(os.environ.get("WORLD_SIZE", "1")))
    for note in plan.notes:
        screen.say(note)
    for warning in plan.fitted.warnings:
        screen.warn(warning)
    if plan.resumed is not None and not plan.resumed.gets_steps:  # a requeued job has nothing left to do
        screen.say(f"{plan.folder.path} is finished; nothing to resume")
        return 0
    eval_section.require_runnable(plan.recipe)
    require_usable(plan.recipe, plan.fitted.base)
    inputs = read_inputs(plan, screen)
    require_template_for_tools(plan.recipe, inputs.data)
    hub.open_repository(plan.recipe.train, plan.folder.path, plan.hub_token)
    loaded = load_base_model(plan, inputs, screen)
    rows = group_rows(plan, loaded, inputs, screen)
    adapted = adapt(plan, loaded, inputs, screen)
    show_header_and_policy(plan, inputs, loaded, rows, adapted, screen)
    run_files.set_chat_template(loaded.processor, loaded.recipe.template)
    first_files = collect_first_files(plan, inputs, loaded, adapted, screen)
    try:
        trainer = make_trainer(plan, inputs, loaded, rows, adapted, first_files)
        trained = train_and_save(plan, rows, trainer, first_files, start)
    finally:
        first_files.close()
    del loaded, rows, adapted, trainer  # the evaluation needs the model's memory
    failed = evaluate(trained, screen)
    return write_results(trained, failed, screen, request.format)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The records, Hugging Face's arguments, and the number of steps that they make."""

    data: RunData
    args: TrainingArguments
    batching: Batching


def read_inputs(plan: Plan, screen: Screen) -> Inputs:
    """Read and check the records, and work out the arguments and the number of steps."""
    recipe, checkpoint = plan.recipe, plan.folder.checkpoint
    run_data.require_named(recipe.data)
    with screen.step(f"reading {run_data.source_text(recipe.data)}"):
        data = run_data.read_records(recipe.data)
    if plan.resumed is not None:
        resuming.require_same_records(plan.resumed.earlier, data)
    args, warnings = training_arguments.for_this_process(plan.section, plan.folder.path)
    resuming.require_same_checkpoint(plan.folder.path, gather(None if checkpoint is None else checkpoint.name))
    batching = count_steps(plan, args, None if recipe.data.streaming else len(data.train))
    if checkpoint is not None:
        stage = training_arguments.zero_stage(args)
        warnings += resuming.warnings(checkpoint, processes=args.world_size, stage=stage)
    for warning in [*data.warnings(), *warnings]:
        screen.warn(warning)
    return Inputs(data, args, batching)


def count_steps(plan: Plan, args: TrainingArguments, num_items: int | None) -> Batching:
    """Return the arithmetic of the run for a number of rows. UserError where a resumed run had other steps."""
    batching = Batching(
        num_records=num_items,
        per_device=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        num_devices=args.world_size,
        epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        drop_last=args.dataloader_drop_last,
    )
    if plan.folder.checkpoint is not None:
        resuming.require_same_steps(plan.folder.checkpoint, plan.recipe, batching.steps)
    return batching


def require_template_for_tools(recipe: Recipe, data: RunData) -> None:
    """Raise DataError if a record uses tools and the model's own chat template, which may write them, is not used."""
    if data.tools_at and recipe.template != OWN and recipe.data.bad_images == "raise":
        raise with_context(no_tools(), data.tools_at)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The base model, its processor, and the recipe that names it; the files of the run hold that one."""

    recipe: Recipe  # the plan's, with the folder of a composed model
    base: Base  # the plan's, or the composed one
    model: Any
    processor: Any
    dtype: torch.dtype  # of the frozen weights
    probe: Probe | None  # the base's predictions, for forgetting during training
    suites: Scored | None  # questions, for scores during training


def load_base_model(plan: Plan, inputs: Inputs, screen: Screen) -> Loaded:
    """Load the base model and its processor."""
    args = inputs.args
    with args.main_process_first(desc="composing the base"):
        recipe, base, line = compose(plan.recipe, plan.fitted.base)
    if line:
        screen.say(line)
    dtype = base_dtype(recipe)
    suites = suites_of(recipe)
    record_checks.require_trainable(recipe, base, inputs.data.train, inputs.data.evaluation or ())
    with screen.step(f"loading {recipe.model}"):
        device = training_arguments.load_device(args)
        loaded, processor = model.load_base(recipe, base, dtype, device)
    for warning in template_warnings(recipe, processor):
        screen.warn(warning)
    probe = None
    if recipe.eval.forgetting_every:
        with screen.step("keeping the base's predictions, for forgetting"):
            probe = Probe(loaded, processor)
    return Loaded(recipe, base, loaded, processor, dtype, probe, suites)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the loader draws from: records, packs of records, or a stream; with lengths where batches go by them."""

    items: Any
    lengths: list[int] | None
    batching: Batching


def group_rows(plan: Plan, loaded: Loaded, inputs: Inputs, screen: Screen) -> Rows:
    """Return what the loader draws from: records, with lengths to group them by, packs of records, or a stream."""
    recipe, records = loaded.recipe, inputs.data.train
    lengths = collators.lengths(recipe, loaded.base, loaded.processor, records)
    if recipe.data.packing:
        assert lengths is not None
        packs, line = collators.packed(recipe, records, lengths)
        screen.say(line)
        return Rows(packs, None, count_steps(plan, inputs.args, len(packs)))
    if recipe.data.streaming:
        inputs.args.ignore_data_skip = True  # a resumed stream itself skips the records that it has read
        return Rows(loaders.stream_of(recipe, inputs.args), lengths, inputs.batching)
    return Rows(records, lengths, inputs.batching)


@dataclass(frozen=True, slots=True)
class Adapted:
    """The model that trains, and, at the start of a run, the spectra of one layer per tower."""

    built: Built
    spectra: Any
    kept: Kept | None  # texts whose answers stay as the base's


def adapt(plan: Plan, loaded: Loaded, inputs: Inputs, screen: Screen) -> Adapted:
    """Apply the policy, or load a checkpoint's adapter; the frozen weights do not change."""
    from transformers import set_seed

    recipe, checkpoint, args = loaded.recipe, plan.folder.checkpoint, inputs.args
    targets = plan.fitted.policy.resolve(loaded.model, cache_dir=recipe.factor_cache)  # ranks may depend on the weights
    for warning in rates.warnings(targets, recipe.train, method=plan.request.edits.method):
        screen.warn(warning)
    targets = rates.in_force(targets, recipe.train)
    spectra = None
    if writes_policy_files(plan.folder):
        with screen.step("measuring the spectrum of one layer per tower"):
            spectra = layer_spectra(loaded.model, targets)
    batches, task, kept = None, None, None
    source = checkpoint or recipe.adapter
    protects = source is None and any(target.protect for target in targets)  # an adapter holds what a calibration chose
    if protects or recipe.keep.weight:
        texts = calibration_batches.make_texts(
            recipe, loaded.base, loaded.model, loaded.processor, inputs.data.train, screen
        )
        batches = texts.batches() if protects else None
        kept = Kept(texts.batches(recipe.keep.texts), recipe.keep.weight) if recipe.keep.weight else None
    if source is None:
        task = calibration_batches.task_batches(recipe, loaded.base, loaded.processor, targets, inputs.data.train)
    set_seed(args.seed)  # LoRA starts from random numbers, here as in HF's example scripts
    with screen.step("applying the policy" if source is None else f"restoring {source}"):
        dtype = training_arguments.trained_dtype(args)
        built = model.build(recipe, loaded.model, targets, checkpoint, batches, task, dtype)
    if plan.section.compiled is not None:
        model.compile_blocks(built.model, plan.section.compiled)
    if args.gradient_checkpointing:
        built.model.enable_input_require_grads()  # frozen embeddings would cut the graph
    return Adapted(built, spectra, kept)


def writes_policy_files(folder: RunFolder) -> bool:
    """Return whether the run writes policy.json and spectrum.json; a resumed run has them already."""
    return folder.checkpoint is None or not (folder.path / "policy.json").is_file()


def show_header_and_policy(
    plan: Plan, inputs: Inputs, loaded: Loaded, rows: Rows, adapted: Adapted, screen: Screen
) -> None:
    """Print what trains, on what, and for how many steps."""
    built, batching, args, folder = adapted.built, rows.batching, inputs.args, plan.folder
    stated, actual = plan.recipe_batch, (batching.per_device, batching.accumulation)
    note = f"   (recipe: {stated[0]} x {stated[1]})" if stated and stated != actual else ""
    source = f"   recipe {plan.request.recipe}" if plan.request.recipe else ""
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"
    continued = [("adapter", str(loaded.recipe.adapter))] if loaded.recipe.adapter else []
    resumed = [] if folder.checkpoint is None else [("resumed", folder.checkpoint.name)]
    screen.block(
        [
            ("model", f"{loaded.recipe.model}{source}"),
            *continued,
            ("data", inputs.data.describe()),
            ("batch", batching.describe() + note),
            ("steps", batching.describe_steps()),
            ("dtype", f"{str(loaded.dtype).removeprefix('torch.')} base, {precision}, on {args.device}"),
            ("run", str(folder.path)),
            *resumed,
        ]
    )
    screen.policy(policy_rows(built.targets, built.sizes, built.report), built.frozen)
    screen.say(trainable_line(built.model))
    for line in protection_lines(built.targets, built.model.milora_protection):
        screen.say(line)
    if adapted.kept is not None:
        kept = adapted.kept
        screen.say(f"keep  {kept.weight:g} x KL from the base on {kept.num_texts} rows of the calibration")
    if plan.resumed is not None and plan.resumed.changes:
        screen.say(f"changed since {plan.folder.checkpoint}: {'; '.join(map(str, plan.resumed.changes))}")


def collect_first_files(plan: Plan, inputs: Inputs, loaded: Loaded, adapted: Adapted, screen: Screen) -> FirstFiles:
    """Return the files that are written when the first step begins."""
    recipe, folder = loaded.recipe, plan.folder
    environment = run_files.describe_environment(
        recipe,
        ["python", "-m", "milora_vl.train", *plan.request.words],
        base=run_files.base_name(loaded.model) or recipe.model,
        device=run_files.device_name(inputs.args.device),
        data=inputs.data,
        dtype=str(loaded.dtype).removeprefix("torch."),
        processes=inputs.args.world_size,
    )
    if plan.resumed is not None:
        environment = resuming.continued(plan.resumed, folder, environment)
    content = {"policy.json": run_files.policy_json(adapted.built), "spectrum.json": adapted.spectra}
    return FirstFiles(
        folder=folder,
        recipe=recipe,
        environment=environment,
        content=content if writes_policy_files(folder) else {},
        screen=screen,
        is_writer=inputs.args.should_save,
    )


@dataclass(frozen=True, slots=True)
class Trained:
    """A run whose weights are on disk."""

    recipe: Recipe
    folder: RunFolder
    args: TrainingArguments
    repository: str  # on the hub, if the run pushes its files


def make_trainer(
    plan: Plan, inputs: Inputs, loaded: Loaded, rows: Rows, adapted: Adapted, first_files: FirstFiles
) -> MiloraTrainer:
    """Return the trainer with its collator and callbacks."""
    recipe, data = loaded.recipe, inputs.data
    collator = collators.collator(recipe, loaded.base, loaded.processor, data.train[:100])
    if recipe.data.feature_cache:
        records = [*data.train, *(data.evaluation or ())]
        cache = Path(recipe.data.feature_cache)
        assert isinstance(collator, ImageTextCollator)  # the plan refuses the cache for other models
        collator.features = features.prepare(cache, loaded.model, collator, records, inputs.args, first_files.screen)
    with refused(recipe.train, kinds=(ValueError, ImportError)):  # what no check of the plan knows
        trainer = MiloraTrainer(
            adapted.built.model,
            inputs.args,
            targets=adapted.built.targets,
            checkpoint_kind=adapted.built.checkpoint_kind,
            data_collator=collator,
            train_dataset=rows.items,
            eval_dataset=data.evaluation,
            processing_class=loaded.processor,
            lengths=rows.lengths,
            kinds=None if rows.lengths is None else data.with_images,
            resume_from=plan.folder.checkpoint,
            kept=adapted.kept,
        )
    trainer.add_callback(AtFirstStep(first_files.write))
    if loaded.probe is not None and recipe.eval.forgetting_every:
        trainer.add_callback(ForgettingCallback(loaded.probe, recipe.eval.forgetting_every, trainer))
    if loaded.suites is not None and recipe.eval.suite_every:
        trainer.suites = SuiteCallback(loaded.suites, recipe.eval.suite_every, trainer, loaded.processor)
        trainer.add_callback(trainer.suites)
    return trainer


def train_and_save(plan: Plan, rows: Rows, trainer: MiloraTrainer, first_files: FirstFiles, start: float) -> Trained:
    """Train and save; a run that stops before its end still gets its losses, model card and report."""
    try:
        run_loop(plan, rows, trainer, first_files)
        return save_weights(plan, rows, trainer, first_files, start)
    except (KeyboardInterrupt, UserError):
        describe_unfinished(trainer, first_files)
        raise


def run_loop(plan: Plan, rows: Rows, trainer: MiloraTrainer, first_files: FirstFiles) -> None:
    """Train with HF's loop; a keyboard interrupt prints how to resume."""
    from peft.helpers import disable_input_dtype_casting
    from transformers import TrainerState

    checkpoint, screen = plan.folder.checkpoint, first_files.screen
    if checkpoint is not None and has_all_steps(checkpoint, rows.batching):
        first_files.write()
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        return
    try:
        # Autocast casts what it multiplies; PEFT would first widen every input to the adapter's float32.
        with (
            failures.explained(trainer.args),
            calls_on_sigterm(trainer.stop_on_signal.on_signal),
            disable_input_dtype_casting(trainer.trained(), active=trainer.accelerator.native_amp),
        ):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        screen.say(f"\nstopped at step {trainer.state.global_step}")
        screen.say(checkpoints.resume_hint(plan.folder.path))
        raise
    if trainer.stop_on_signal.stopped and trainer.state.global_step < rows.batching.steps:
        raise UserError(
            f"stopped by SIGTERM at step {trainer.state.global_step}, which is saved",
            code="run-stopped-by-signal",
            hint="to resume, repeat the command with  --resume_from_checkpoint auto",
            exit_code=128 + signal.SIGTERM,
        )
    for warning in collators.warnings_of(trainer.data_collator):  # type: ignore[arg-type]
        screen.warn(warning)


def has_all_steps(checkpoint: Path | None, batching: Batching) -> bool:
    """Return whether only the end of the run was lost: HF's loop would make one more step before it sees max_steps."""
    return checkpoint is not None and step_of(checkpoint) == batching.steps


def describe_unfinished(trainer: MiloraTrainer, first_files: FirstFiles) -> None:
    """Write the losses so far, the model card and the report of a run that stopped before its end."""
    if not (trainer.args.should_save and first_files.has_begun):
        return
    try:
        write_state(trainer, first_files.folder)
        write_pages(first_files.folder, first_files.recipe, first_files.screen)
    except OSError as error:  # the disk is full: the user has to read what ended the run, not this
        first_files.screen.warn(f"no report: {error}")


def write_state(trainer: MiloraTrainer, folder: RunFolder) -> None:
    """Write trainer_state.json as HF's Trainer does, but atomically: a full disk leaves the one before it."""
    folder.write_json("trainer_state.json", asdict(trainer.state))


def save_weights(plan: Plan, rows: Rows, trainer: MiloraTrainer, first_files: FirstFiles, start: float) -> Trained:
    """Write the final weights, the processor and HF's state at the root of the run folder."""
    folder, args = plan.folder, trainer.args
    with failures.explained(args):
        best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is None and not has_all_steps(folder.checkpoint, rows.batching):
            trainer.save_model(_internal_call=True)  # pushed when the pages are there too
        elif args.should_save:
            checkpoints.copy_results(Path(best or str(folder.checkpoint)), folder.path)
        if args.should_save:
            write_state(trainer, folder)
    if args.should_save:
        first_files.environment["finished"] = datetime.now().astimezone().isoformat(timespec="seconds")
        first_files.environment["seconds"] = round(time.monotonic() - start, 1)
        folder.write_json(ENVIRONMENT, first_files.environment)
    return Trained(first_files.recipe, folder, args, trainer.hub_model_id or "")


def evaluate(trained: Trained, screen: Screen) -> list[str]:
    """Start each evaluation that the recipe asks for as a separate process. Returns the commands that failed."""
    commands = eval_section.commands(trained.recipe, trained.folder.path)
    if not commands or not trained.args.should_save:
        return []
    gc.collect()  # the trainer holds itself in a circle
    torch.cuda.empty_cache()
    failed = []
    for command in commands:
        screen.say("python " + " ".join(command))
        if subprocess.run([sys.executable, *command], stdout=sys.stderr).returncode:
            failed.append("python " + " ".join(command))
    return failed


def write_results(trained: Trained, failed: list[str], screen: Screen, style: str) -> int:
    """Write the model card and the report, push them, and print where everything is. Returns the exit code."""
    pushed = True
    if trained.args.should_save:
        show_results(trained.folder, trained.recipe, screen, style)
        if trained.args.push_to_hub:
            pushed = push_to_hub(trained, screen)
    for command in failed:
        screen.warn(f"the evaluation failed, the training is saved; to evaluate again: {command}")
    return 1 if failed or not pushed else 0


def push_to_hub(trained: Trained, screen: Screen) -> bool:
    """Push the run folder to the hub; a failure is a warning, since the training is saved."""
    try:
        with screen.step(f"pushing to {trained.repository}"):
            url = hub.push(trained.folder.path, trained.repository, trained.args.hub_revision)
            screen.say(f"pushed   {url}")
    except UserError as error:
        screen.warn(str(error))
        return False
    return True


def show_results(folder: RunFolder, recipe: Recipe, screen: Screen, style: str = "human") -> None:
    """Write README.md and report.html and print the closing block. A failed report does not fail the run.

    With the style `json`, the last line of stdout is a JSON object with the block and the results of training.
    """
    page = write_pages(folder, recipe, screen)
    weights = next((name for name in WEIGHTS if (folder.path / name).is_file()), "")
    rows = [("weights", str(folder.path / weights))]
    if page is not None:
        rows.append(("report", str(page)))
    rows.append(("recipe", str(folder.path / "recipe.yaml")))
    rows.append(("next", next_command(folder.path, recipe)))
    screen.block(rows)
    if style == "json":
        content = {"output_dir": str(folder.path), **dict(rows), "results": measured(folder.path)}
        sys.stdout.write(json.dumps(content) + "\n")


def measured(path: Path) -> dict[str, float]:
    """Return the last logged value of each key (losses, speed, time); empty if nothing was logged."""
    file = path / "trainer_state.json"
    entries = json.loads(file.read_text(encoding="utf-8"))["log_history"] if file.is_file() else []
    return {name: value for entry in entries for name, value in entry.items()}


def write_pages(folder: RunFolder, recipe: Recipe, screen: Screen) -> Path | None:
    """Write README.md and report.html. Return the path of report.html, or None if it could not be written."""
    folder.write_text(CARD, model_card.render(folder.path, recipe.model_dump()))
    return try_write_report(folder.path, screen.warn)


def next_command(path: Path, recipe: Recipe) -> str:
    """Return the command that a user most likely needs next."""
    question = ["QUESTION"] if holds_text_model(path) else ["--image", "PICTURE", "What is this?"]
    if has_config(path):
        return command_line("milora_vl.chat", "--model", recipe.model, "--adapter", path, *question)
    if holds_projector_alone(path):
        words = ("--model", recipe.model, "--projector_weights", path, "--data_path", "DATA.json")
        return command_line("milora_vl.train", *words)
    return command_line("milora_vl.chat", "--model", path, *question)
