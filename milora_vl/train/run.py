"""One training run from its settings to its report, by three values: `Plan`, `Ready` and `Trained`.

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
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from milora_data.encode.templates import OWN, no_tools
from milora_vl.common.cli.command_line import command_line
from milora_vl.common.errors import UserError, with_context
from milora_vl.common.evaluator import TrainingQuestions
from milora_vl.core.adapter import checkpoints
from milora_vl.core.adapter.checkpoints import WEIGHTS, step_of
from milora_vl.core.adapter.earlier import joined_rank, read_earlier
from milora_vl.core.adapter.folders import has_config, holds_projector_alone, holds_text_model
from milora_vl.core.adapter.lora import base_model_of
from milora_vl.core.weights.distributed import gather
from milora_vl.report import model_card
from milora_vl.report.page import try_write_report
from milora_vl.train import (
    calibration_batches,
    collators,
    failures,
    hub,
    loaders,
    model,
    run_files,
    training_arguments,
)
from milora_vl.train.base_kl import BaseKL
from milora_vl.train.evaluation import SuiteCallback, training_questions
from milora_vl.train.forgetting import ForgettingCallback, Probe
from milora_vl.train.model import Built
from milora_vl.train.plan import earlier_tasks, eval_section, record_checks, resuming, run_data
from milora_vl.train.plan.base import require_usable
from milora_vl.train.plan.batching import Batching
from milora_vl.train.plan.fit import template_warnings
from milora_vl.train.plan.plan import Plan, make_plan
from milora_vl.train.plan.run_data import RunData
from milora_vl.train.plan.run_folder import CARD, ENVIRONMENT, RunFolder
from milora_vl.train.plan.screen import Screen, policy_rows, protection_lines, trainable_line
from milora_vl.train.plan.train_section import base_dtype, dtype_name, refused
from milora_vl.train.recipe.merge import Settings, batch_of
from milora_vl.train.recipe.schema import Recipe
from milora_vl.train.run_files import AtFirstStep, FirstFiles
from milora_vl.train.spectrum import layer_spectra
from milora_vl.train.trainer import MiloraTrainer, calls_on_sigterm

if TYPE_CHECKING:
    from transformers import TrainingArguments


def train(settings: Settings) -> int:
    """Run a training from its settings to its report. Returns the exit code."""
    start, screen = time.monotonic(), Screen()
    plan = make_plan(settings, processes=int(os.environ.get("WORLD_SIZE", "1")))
    show_notes(plan, screen)
    if plan.resumed is not None and not plan.resumed.gets_steps:  # a requeued job has nothing left to do
        screen.say(f"{plan.folder.path} is finished; nothing to resume")
        return 0
    eval_section.require_runnable(plan.recipe)
    require_usable(plan.recipe, plan.base)
    ready = make_ready(plan, screen)
    show_header_and_policy(ready, screen)
    first_files = collect_first_files(ready, screen)
    first_files.environment["seconds_before_training"] = round(time.monotonic() - start, 1)
    try:
        trainer = make_trainer(ready, first_files)
        trained = train_and_save(ready, trainer, first_files, start)
    finally:
        first_files.close()
    del ready, trainer  # the evaluation needs the model's memory
    failed = evaluate(trained, screen)
    return write_results(trained, failed, screen, settings.request.format)


def show_notes(plan: Plan, screen: Screen) -> None:
    """Print what the flags change, and warnings about settings."""
    for note in plan.settings.notes:
        screen.say(note)
    for warning in plan.warnings:
        screen.warn(warning)


@dataclass(frozen=True, slots=True)
class Ready:
    """All that a training needs: the model with its adapter, the rows that it reads, and Hugging Face's arguments."""

    plan: Plan  # on a base that exists, if the run composes one
    data: RunData
    args: TrainingArguments
    processor: Any
    built: Built
    base_kl: BaseKL | None  # texts whose answers stay as the base's
    spectra: Any  # of one layer per tower, at the start of a run
    rows: Any  # what the loader draws from: records, packs of records, or a stream
    lengths: list[int] | None  # of the rows, where batches go by them
    batching: Batching
    probe: Probe | None  # the base's predictions, for forgetting during training
    questions: TrainingQuestions | None  # for scores during training


def make_ready(plan: Plan, screen: Screen) -> Ready:
    """Read the records, load the base, order the rows and apply the policy. Only caches are written."""
    data, args, batching = read_inputs(plan, screen)
    require_template_for_tools(plan.recipe, data)
    earlier = earlier_tasks.read_earlier_records(plan.tasks, plan.recipe, screen, are_used=plan.reads_calibration)
    plan = replace(plan, tasks=earlier.tasks)
    hub.open_repository(plan.recipe.train, plan.folder.path, plan.hub_token)
    with args.main_process_first(desc="composing the base"):
        plan, line = plan.composed()
    if line:
        screen.say(line)
    questions = training_questions(plan.recipe)
    record_checks.require_trainable(plan.recipe, plan.base, data.train, data.evaluation or ())
    loaded, processor = load_base_model(plan, args, screen)
    probe = None
    if plan.recipe.eval.forgetting_every:
        with screen.step("keeping the base's predictions, for forgetting"):
            probe = Probe(loaded, processor)
    lengths = collators.lengths(plan.recipe, plan.base, processor, data.train)
    rows: Any = data.train
    if plan.recipe.data.packing:
        assert lengths is not None
        rows, line = collators.packed(plan.recipe, data.train, lengths)
        screen.say(line)
        lengths, batching = None, count_steps(plan, args, len(rows))
    elif plan.recipe.data.streaming:
        args.ignore_data_skip = True  # a resumed stream itself skips the records that it has read
        rows = loaders.stream_of(plan.recipe, args)
    built, base_kl, spectra = adapt(plan, loaded, processor, data, earlier, args, batching.steps, screen)
    run_files.set_chat_template(processor, plan.recipe.template)
    return Ready(plan, data, args, processor, built, base_kl, spectra, rows, lengths, batching, probe, questions)


def read_inputs(plan: Plan, screen: Screen) -> tuple[RunData, TrainingArguments, Batching]:
    """Read and check the records, and work out the arguments and the number of steps."""
    recipe, checkpoint = plan.recipe, plan.folder.checkpoint
    run_data.require_named(recipe.data)
    with screen.step(f"reading {run_data.source_text(recipe.data)}"):
        data = run_data.read_records(recipe.data)
    if plan.resumed is not None:
        resuming.require_same_records(plan.resumed.earlier, data)
    elif recipe.adapter and earlier_tasks.has_other_records(Path(recipe.adapter), data.fingerprint):
        screen.say(
            f"note: {recipe.adapter} was trained on other records, and this run overwrites what it has learned; "
            f"--after {recipe.adapter} keeps it"
        )
    elif any(task["fingerprint"] == data.fingerprint for task in plan.tasks):
        screen.say("note: an earlier run was trained on these records; for more steps on them use --adapter")
    args, warnings = training_arguments.for_this_process(plan.section, plan.folder.path)
    resuming.require_same_checkpoint(plan.folder.path, gather(None if checkpoint is None else checkpoint.name))
    batching = count_steps(plan, args, None if recipe.data.streaming else len(data.train))
    if checkpoint is not None:
        stage = training_arguments.zero_stage(args)
        warnings += resuming.warnings(checkpoint, processes=args.world_size, stage=stage)
    for warning in [*data.warnings(), *warnings]:
        screen.warn(warning)
    return data, args, batching


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
        unit="packed row" if plan.recipe.data.packing else "record",
    )
    if plan.folder.checkpoint is not None:
        resuming.require_same_steps(plan.folder.checkpoint, plan.recipe, batching.steps)
    return batching


def require_template_for_tools(recipe: Recipe, data: RunData) -> None:
    """Raise DataError if a record uses tools and the model's own chat template, which may write them, is not used."""
    if data.tools_at and recipe.template != OWN and recipe.data.bad_images == "raise":
        raise with_context(no_tools(), data.tools_at)


def load_base_model(plan: Plan, args: TrainingArguments, screen: Screen) -> tuple[torch.nn.Module, Any]:
    """Load the base model and its processor."""
    recipe = plan.recipe
    with screen.step(f"loading {recipe.model}"):
        device = training_arguments.load_device(args)
        loaded, processor = model.load_base(recipe, plan.base, base_dtype(recipe), device)
    for warning in template_warnings(recipe, processor):
        screen.warn(warning)
    return loaded, processor


def adapt(
    plan: Plan,
    loaded: torch.nn.Module,
    processor: Any,
    data: RunData,
    records: earlier_tasks.EarlierRecords,
    args: TrainingArguments,
    steps: int,
    screen: Screen,
) -> tuple[Built, BaseKL | None, Any]:
    """Apply the policy, or load a checkpoint's adapter; the frozen weights do not change.

    Returns the model, the texts whose answers stay, and the spectra of one layer per tower.
    """
    from transformers import set_seed

    recipe, checkpoint, targets = plan.recipe, plan.folder.checkpoint, list(plan.targets)
    spectra = None
    if writes_policy_files(plan.folder):
        with screen.step("measuring the spectrum of one layer per tower"):
            spectra = layer_spectra(loaded, targets)
    batches, base_kl = None, None
    source = checkpoint or recipe.adapter
    earlier = None
    if recipe.after and checkpoint is None:
        earlier = read_earlier(loaded, Path(recipe.after), targets, plan.tasks)
    protects = source is None and any(target.protect for target in targets)  # an adapter holds what a calibration chose
    chosen = targets if source is None else []
    with calibration_batches.shown_start(plan, loaded, chosen, steps, screen):
        if protects or plan.base_kl.weight:
            texts = calibration_batches.make_texts(
                recipe, plan.base, loaded, processor, data.train, screen, steps, records
            )
            batches = texts.sources() if protects else None
        if plan.base_kl.weight:
            base_kl = BaseKL(texts.sources(plan.base_kl.texts), plan.base_kl.weight, plan.base_kl.every)
        set_seed(args.seed)  # LoRA starts from random numbers, here as in HF's example scripts
        with screen.step("applying the policy" if source is None else f"restoring {source}"):
            dtype = training_arguments.trained_dtype(args)
            built = model.build(recipe, loaded, targets, checkpoint, batches, dtype, earlier)
    if earlier is not None:
        count, protection = data.counts().get("train"), built.model.milora_protection
        own = earlier_tasks.entry(plan.folder.path, recipe, targets, protection, count, data.fingerprint)
        built.model.earlier = replace(earlier, tasks=(*plan.tasks, own))
    if plan.section.compiled is not None:
        model.compile_blocks(built.model, plan.section.compiled)
    if args.gradient_checkpointing:
        built.model.enable_input_require_grads()  # frozen embeddings would cut the graph
    return built, base_kl, spectra


def writes_policy_files(folder: RunFolder) -> bool:
    """Return whether the run writes policy.json and spectrum.json; a resumed run has them already."""
    return folder.checkpoint is None or not (folder.path / "policy.json").is_file()


def show_header_and_policy(ready: Ready, screen: Screen) -> None:
    """Print what trains, on what, and for how many steps."""
    plan, built, batching, args = ready.plan, ready.built, ready.batching, ready.args
    folder, recipe, request = plan.folder, plan.recipe, plan.settings.request
    stated, actual = batch_of(request.recipe_file), (batching.per_device, batching.accumulation)
    note = f"   (recipe: {stated[0]} x {stated[1]})" if stated and stated != actual else ""
    source = f"   recipe {request.recipe}" if request.recipe else ""
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"
    continued = [("adapter", recipe.adapter)] if recipe.adapter else []
    if plan.tasks:
        rank = joined_rank(built.model.earlier, built.targets)
        continued = [("after", f"{recipe.after}; the LoRA of all {len(plan.tasks) + 1} tasks has rank {rank}")]
    resumed = [] if folder.checkpoint is None else [("resumed", folder.checkpoint.name)]
    screen.block(
        [
            ("model", f"{recipe.model}{source}"),
            *continued,
            ("data", ready.data.describe()),
            ("batch", batching.describe() + note),
            ("steps", batching.describe_steps()),
            ("dtype", f"{dtype_name(recipe)} base, {precision}, on {args.device}"),
            ("run", str(folder.path)),
            *resumed,
        ]
    )
    screen.policy(policy_rows(built.targets, built.sizes, base_model_of(built.model), built.report), built.frozen)
    screen.say(trainable_line(built.model))
    protection = built.model.milora_protection
    for line in protection_lines(built.targets, protection):
        screen.say(line)
    for line in earlier_tasks.room_lines(built.targets, protection, plan.tasks) if plan.tasks else ():
        screen.say(line)
    if ready.base_kl is not None:
        base_kl, every = ready.base_kl, f"in one step of {ready.base_kl.every}"
        rows = f"{base_kl.num_texts} rows of the calibration"
        start = "the base after the earlier runs" if plan.tasks else "the base"
        screen.say(f"base_kl  {base_kl.factor:g} x KL from {start} on {rows}, {every}")
        if ready.batching.steps < base_kl.every:
            screen.say("base_kl has no effect: the run has fewer steps than base_kl.every")
    if plan.resumed is not None and plan.resumed.changes:
        screen.say(f"changed since {folder.checkpoint}: {'; '.join(map(str, plan.resumed.changes))}")


def collect_first_files(ready: Ready, screen: Screen) -> FirstFiles:
    """Return the files that are written when the first step begins."""
    plan, recipe = ready.plan, ready.plan.recipe
    environment = run_files.describe_environment(
        plan,
        base=run_files.base_name(base_model_of(ready.built.model)) or recipe.model,
        device=run_files.device_name(ready.args.device),
        data=ready.data,
        dtype=dtype_name(recipe),
        processes=ready.args.world_size,
    )
    if plan.resumed is not None:
        environment = resuming.continued(plan.resumed, plan.folder, environment)
    content = {"policy.json": run_files.policy_json(ready.built), "spectrum.json": ready.spectra}
    return FirstFiles(
        folder=plan.folder,
        recipe=recipe,
        environment=environment,
        content=content if writes_policy_files(plan.folder) else {},
        screen=screen,
        is_writer=ready.args.should_save,
    )


@dataclass(frozen=True, slots=True)
class Trained:
    """A run whose weights are on disk."""

    recipe: Recipe
    folder: RunFolder
    args: TrainingArguments
    repository: str  # on the hub, if the run pushes its files


def make_trainer(ready: Ready, first_files: FirstFiles) -> MiloraTrainer:
    """Return the trainer with its collator and callbacks."""
    recipe, data, built = ready.plan.recipe, ready.data, ready.built
    collator = collators.collator(recipe, ready.plan.base, ready.processor, data.train[:100])
    with refused(recipe.train, kinds=(ValueError, ImportError)):  # what no check of the plan knows
        trainer = MiloraTrainer(
            built.model,
            ready.args,
            targets=built.targets,
            checkpoint_kind=built.checkpoint_kind,
            data_collator=collator,
            train_dataset=ready.rows,
            eval_dataset=data.evaluation,
            processing_class=ready.processor,
            lengths=ready.lengths,
            kinds=None if ready.lengths is None else data.with_images,
            resume_from=ready.plan.folder.checkpoint,
            base_kl=ready.base_kl,
        )
    trainer.add_callback(AtFirstStep(first_files.write))
    if ready.probe is not None and recipe.eval.forgetting_every:
        trainer.add_callback(ForgettingCallback(ready.probe, recipe.eval.forgetting_every, trainer))
    if ready.questions is not None and recipe.eval.suite_every:
        trainer.suites = SuiteCallback(ready.questions, recipe.eval.suite_every, trainer, ready.processor)
        trainer.add_callback(trainer.suites)
    return trainer


def train_and_save(ready: Ready, trainer: MiloraTrainer, first_files: FirstFiles, start: float) -> Trained:
    """Train and save; a run that stops before its end still gets its losses, model card and report."""
    try:
        run_loop(ready, trainer, first_files)
        return save_weights(ready, trainer, first_files, start)
    except (KeyboardInterrupt, UserError):
        describe_unfinished(trainer, first_files)
        raise


def run_loop(ready: Ready, trainer: MiloraTrainer, first_files: FirstFiles) -> None:
    """Train with HF's loop; a keyboard interrupt prints how to resume."""
    from peft.helpers import disable_input_dtype_casting
    from transformers import TrainerState

    plan, checkpoint, screen = ready.plan, ready.plan.folder.checkpoint, first_files.screen
    if checkpoint is not None and has_all_steps(checkpoint, ready.batching):
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
    if trainer.stop_on_signal.stopped and trainer.state.global_step < ready.batching.steps:
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


def save_weights(ready: Ready, trainer: MiloraTrainer, first_files: FirstFiles, start: float) -> Trained:
    """Write the final weights, the processor and HF's state at the root of the run folder."""
    folder, args = ready.plan.folder, trainer.args
    with failures.explained(args):
        best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is None and not has_all_steps(folder.checkpoint, ready.batching):
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
