"""One training run, top to bottom: what can be wrong is found before the model loads, and only caches are written
before the first step begins.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_pt_utils import get_model_param_count

from milora_data.check import RunData, source_text
from milora_data.encode.templates import OWN, render_chat_template
from milora_data.encode.tokens import remember_legacy
from milora_vl.common.atomic_write import created
from milora_vl.common.cli.console import git_state, versions
from milora_vl.common.cli.screen import Screen
from milora_vl.common.errors import UserError
from milora_vl.common.evaluator_protocol import TrainingQuestions
from milora_vl.core.adapter import folders
from milora_vl.core.adapter.earlier import joined_rank, read_earlier
from milora_vl.core.policy.resolve import policy_rows
from milora_vl.core.weights.distributed import free_memory, gather_objects, raised_in_all, rank_and_world_size
from milora_vl.forgetting.measure import Probe
from milora_vl.interop.base_kl import BaseKL
from milora_vl.models.base import Base, split_processor
from milora_vl.models.memory_plan import size_text
from milora_vl.train import data
from milora_vl.train.callbacks import MeasuringCallback, SuiteCallback, calls_on_sigterm, training_questions
from milora_vl.train.counts import Batching, num_parameters
from milora_vl.train.join_settings import Settings
from milora_vl.train.launch import load_base_model, refused_arguments, stage_of, trained_dtype
from milora_vl.train.output import (
    FirstFiles,
    evaluate_run,
    open_repository,
    protection_lines,
    push_results,
    room_lines,
    run_failures,
    write_held_out,
    write_pages,
    write_results,
)
from milora_vl.train.plan import Run, make_run, show_policy, trainable_line
from milora_vl.train.resume import (
    ENVIRONMENT,
    RECORDS,
    TEXTS,
    EarlierRecords,
    environment_resumed,
    read_earlier_records,
    read_start,
    records_content,
    require_same_checkpoint,
    require_same_records,
    require_same_steps,
    resume_warnings,
    shown_value,
    task_entry,
)
from milora_vl.train.settings import without_unseen_projector
from milora_vl.train.start import Built, build_model, compile_blocks, make_texts, show_start
from milora_vl.train.trainer import MiloraTrainer


def train(settings: Settings) -> int:
    start, screen = time.monotonic(), Screen()
    run = make_run(settings, is_started=True)
    if run.earlier is not None and not run.earlier.gets_steps:  # a requeued job has nothing left to do
        screen.say(f"{run.folder.path} is finished; nothing to resume")
        return 0
    with ExitStack() as stack:
        with raised_in_all():
            data.require_evaluation(run.recipe)
            data.require_usable(run.recipe, run.base)
            data.require_named(run.recipe.data)
            for note in run.notes:
                screen.say(note)
            for warning in run.warnings:
                screen.warn(warning)
            if run.args.should_save:
                stack.enter_context(created(run.folder.path))
            run, records, earlier = read_records(run, screen)
            open_repository(run.recipe.train, run.folder.path, run.hub_token)
            run = compose_base(run, screen)
            questions = training_questions(run.recipe, run.args.per_device_train_batch_size)
            loaded, processor = load_base(run, records, screen)
            probe = make_probe(run, loaded, processor, screen)
            rows = order_rows(run, records, processor, screen)
            built, base_kl, start_files = adapt(run, loaded, processor, records, earlier, rows.batching.steps, screen)
            set_chat_template(processor, run.recipe.template)
            show_header_and_policy(run, records, built, base_kl, rows.batching, screen)
            files = collect_first_files(run, records, built, start_files, screen, start)
            trainer = make_trainer(run, records, rows, built, base_kl, processor, files)
            add_measurements(trainer, run, probe, questions, processor)
        train_and_save(run, trainer, rows.batching, files)
        write_held_out(run, trainer, records.evaluation, processor, screen)
        close_processes()
        if run.args.should_save:
            complete_folder(run, trainer, rows.batching, files, start)
    is_writer = run.args.should_save
    recipe, folder, args, repository = run.recipe, run.folder, run.args, trainer.hub_model_id or ""
    del run, loaded, probe, built, base_kl, trainer  # the evaluation needs the model's memory
    failed = evaluate_run(recipe, folder, screen) if is_writer else []
    if not is_writer:
        return 0
    code = write_results(recipe, folder, screen, settings.request.format, failed)
    pushed = not args.push_to_hub or push_results(folder, repository, args.hub_revision, screen)
    return code if pushed else 1


def close_processes() -> None:
    """Close the process group of a run that succeeded: no process waits for the first one's copies and evaluation.

    After an error the others may wait elsewhere, and closing would wait for them. The pause is for a thread of gloo
    that still releases the tensors of the last collective: at the end of the interpreter it would abort the process.
    """
    if rank_and_world_size()[1] > 1:
        time.sleep(0.5)
        dist.destroy_process_group()


def read_records(run: Run, screen: Screen) -> tuple[Run, RunData, EarlierRecords]:
    """Read and check the records and those of earlier tasks. Returns the run on them: an unseen projector is frozen.

    Raises UserError for other records than another process or the resumed run has.
    """
    recipe, folder = run.recipe, run.folder
    with screen.step(f"reading {source_text(recipe.data.path)} and its pictures"):
        records = data.read_records(recipe.data)
        keys = records.fingerprint, records.pictures
    warnings = records.warnings()
    # The first records of a stream say nothing about all.
    has_pictures = recipe.data.streaming or any(record.images for record in records.train)
    targets, note = without_unseen_projector(run.targets, recipe, has_pictures=has_pictures)
    run = replace(run, targets=targets)
    if note:
        screen.say(note)
    checkpoint = None if folder.checkpoint is None else folder.checkpoint.name
    told = gather_objects((checkpoint, *keys))
    require_same_checkpoint(folder.path, [name for name, *_ in told])
    other = next((rank for rank, (_, *found) in enumerate(told) if found != list(told[0][1:])), None)
    if other is not None:
        message = f"rank {other} reads other records or pictures than rank 0"
        raise UserError(message, where=str(recipe.data.path), hint="all machines must see the same data")
    if run.earlier is not None:
        warnings += require_same_records(run.earlier.folder, records, recipe)
    if folder.checkpoint is not None:
        stage, fsdp = stage_of(run.args), bool(run.args.fsdp)
        warnings += resume_warnings(folder.checkpoint, processes=run.args.world_size, stage=stage, fsdp=fsdp)
    for warning in warnings:
        screen.warn(warning)
    return run, records, read_earlier_records(run.tasks, recipe, screen, are_used=run.reads_calibration)


def compose_base(run: Run, screen: Screen) -> Run:
    """Return the run on a base that exists."""
    run, line = run.composed()
    if line:
        screen.say(line)
    return run


def load_base(run: Run, records: RunData, screen: Screen) -> tuple[nn.Module, Any]:
    recipe, args = run.recipe, run.args
    data.check(data.strict_collator(recipe, run.base, run.base.processor), recipe, records)
    if args.fsdp:
        require_one_device(run.base, run.launch.dtype, args)
    with screen.step(f"loading {recipe.model}"):
        loaded, processor = load_base_model(recipe, run.base, run.launch.dtype, args.device)
    tokenizer, pictures = split_processor(processor)
    if pictures is None and recipe.template == "vicuna_v1" and tokenizer.chat_template:
        screen.warn("the template is vicuna_v1, but this model has a chat template: use --template chat_template")
    return loaded, processor


def require_one_device(base: Base, dtype: torch.dtype, args: TrainingArguments) -> None:
    """Raise UserError if a base does not fit on an accelerator beside its shard: FSDP2 shards it after the start."""
    size = num_parameters(base.meta) * dtype.itemsize * (1 + 1 / args.world_size)
    device, free = args.device, free_memory(args.device)
    if device.type != "cpu" and size > free:
        message = f"{device} has {size_text(free)} free, and FSDP2 needs {size_text(size)}: the base and its shard"
        raise UserError(message, where="--fsdp", hint="load it in shards:  --deepspeed zero3")


def make_probe(run: Run, loaded: nn.Module, processor: Any, screen: Screen) -> Probe | None:
    if not run.recipe.eval.forgetting_every:
        return None
    with screen.step("keeping the base's predictions, for forgetting"):
        return Probe(loaded, processor)


@dataclass(frozen=True, slots=True)
class Rows:
    """What the loader draws from: records, packs of records, or a stream; and the number of steps."""

    rows: Any
    lengths: list[int] | None  # of the rows, where batches go by them
    batching: Batching


def order_rows(run: Run, records: RunData, processor: Any, screen: Screen) -> Rows:
    """Pack or order the records, and count the steps. Raises UserError where a resumed run had other steps."""
    recipe = run.recipe
    rows: Any = records.train
    lengths = data.lengths(recipe, data.collator(recipe, run.base, processor), records.train)
    number: int | None = len(records.train)
    if recipe.data.packing:
        assert lengths is not None
        rows, line = data.packed(recipe, records.train, lengths)
        screen.say(line)
        number, lengths = len(rows), None
    elif recipe.data.streaming:
        run.args.ignore_data_skip = True  # a resumed stream itself skips the records that it has read
        rows = data.stream_of(recipe, run.args)
    batching = Batching.of(recipe, number, run.args.world_size)
    if run.folder.checkpoint is not None:
        require_same_steps(run.folder.checkpoint, recipe, batching.steps)
    return Rows(rows, lengths, batching)


def adapt(
    run: Run, loaded: nn.Module, processor: Any, records: RunData, earlier: EarlierRecords, steps: int, screen: Screen
) -> tuple[Built, BaseKL | None, dict[str, Any]]:
    """Apply the policy, or load a checkpoint's adapter; the frozen weights do not change.

    Returns the model, the texts whose answers stay, and the content of files of the run.
    """
    recipe, checkpoint, targets, term = run.recipe, run.folder.checkpoint, list(run.targets), run.base_kl
    source = checkpoint or recipe.adapter
    held = read_earlier(loaded, Path(recipe.after), targets, run.tasks) if recipe.after and checkpoint is None else None
    batches, weights, base_kl, files = None, None, None, dict[str, Any]({RECORDS: records_content(records)})
    show_start(run, loaded, steps, screen)
    if run.reads_calibration:
        stored = None if checkpoint is None else read_start(checkpoint.parent, TEXTS)
        texts = make_texts(recipe, run.base, loaded, processor, records.train, screen, steps, earlier, stored)
        files[TEXTS] = texts.content
        batches, weights = (texts.sources(), texts.made_by.weights) if run.protects else (None, None)
        if term.weight:
            base_kl = BaseKL(texts.sources(term.texts), term.weight, term.every)
    set_seed(run.args.seed)  # LoRA starts from random numbers, here as in HF's example scripts
    with screen.step("applying the policy" if source is None else f"restoring {source}"):
        dtype = trained_dtype(run.args)
        built = build_model(recipe, loaded, targets, checkpoint, batches, dtype, held, weights)
    if held is not None:
        own = task_entry(run.folder.path, recipe, targets, built.model.milora_protection, records)
        built.model.earlier = replace(held, tasks=(*run.tasks, own))
    if run.launch.compiled is not None:
        compile_blocks(built.model, run.launch.compiled)
    if run.args.gradient_checkpointing:
        built.model.enable_input_require_grads()  # frozen embeddings would cut the graph
    if run.args.device.type == "cuda":
        torch.cuda.empty_cache()  # what the start needed; the largest blocks do not fit what a step asks for
    return built, base_kl, files


def set_chat_template(processor: Any, template: str) -> None:
    """Set the chat template of processor and tokenizer, so that it renders exactly the prompt of training."""
    tokenizer, image_processor = split_processor(processor)
    remember_legacy(tokenizer)
    if template != OWN:
        tokenizer.chat_template = render_chat_template(template, tokenizer, bos=image_processor is None)
    if image_processor is not None:
        processor.chat_template = tokenizer.chat_template


def show_header_and_policy(
    run: Run, records: RunData, built: Built, base_kl: BaseKL | None, batching: Batching, screen: Screen
) -> None:
    recipe, args, folder, protection = run.recipe, run.args, run.folder, built.model.milora_protection
    source = f"   recipe {run.request.recipe}" if run.request.recipe else ""
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"
    continued = [("adapter", recipe.adapter)] if recipe.adapter else []
    if run.tasks:
        rank = joined_rank(built.model.earlier, built.targets)
        continued = [("after", f"{recipe.after}; the LoRA of all {len(run.tasks) + 1} tasks has rank {rank}")]
    resumed = [] if folder.checkpoint is None else [("resumed", folder.checkpoint.name)]
    screen.block(
        [
            ("model", f"{recipe.model}{source}"),
            *continued,
            ("data", records.describe()),
            ("batch", batching.describe()),
            ("steps", batching.describe_steps()),
            ("dtype", f"{run.launch.dtype_name} base, {precision}, on {args.device}"),
            ("run", str(folder.path)),
            *resumed,
        ]
    )
    energies = {layer.path: layer.energy for layer in built.model.milora_report}
    rows = policy_rows(recipe.policy or [], built.targets, built.sizes, run.base.meta, energies)
    show_policy(screen, rows, built.frozen)
    screen.say(trainable_line(get_model_param_count(built.model, True), get_model_param_count(built.model)))
    for line in protection_lines(built.targets, protection):
        screen.say(line)
    for line in room_lines(built.targets, protection, run.tasks) if run.tasks else ():
        screen.say(line)
    if base_kl is not None:
        base = "the base after the earlier runs" if run.tasks else "the base"
        texts = f"{base_kl.num_texts} rows of the calibration, in one step of {base_kl.every}"
        screen.say(f"base_kl  {base_kl.factor:g} x KL from {base} on {texts}")
        if batching.steps < base_kl.every:
            screen.say("base_kl has no effect: the run has fewer steps than base_kl.every")
    if run.earlier is not None and run.earlier.changes:
        changes = (f"{key} {shown_value(old)} -> {shown_value(new)}" for key, (old, new) in run.earlier.changes.items())
        screen.say(f"changed since {folder.checkpoint}: {'; '.join(changes)}")


def collect_first_files(
    run: Run, records: RunData, built: Built, more: Mapping[str, Any], screen: Screen, start: float
) -> FirstFiles:
    recipe, device = run.recipe, run.args.device
    environment = {
        "command": ["python", "-m", "milora_vl.train", *run.request.words],
        "versions": versions(),
        "git": git_state(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": run.args.world_size,
        "dtype": run.launch.dtype_name,
        "started": run.started.isoformat(timespec="seconds"),
        "finished": None,
        "seconds": 0.0,
        "seconds_before_training": round(time.monotonic() - start, 1),  # of these: loading, calibration
        "seed": run.args.seed,
        "model": recipe.model,
        "base": str(built.model.config.name_or_path) or recipe.model,  # as adapters record it
        "data": records.counts(),
        "records": records.fingerprint,
        "pictures": records.pictures,
    }
    if run.earlier is not None:
        environment = environment_resumed(run.earlier, run.folder, environment)
    policy = {
        "targets": [target.to_dict() for target in built.targets],
        "layers": [asdict(layer) for layer in built.model.milora_report],
        "protection": {path: asdict(entry) for path, entry in built.model.milora_protection.items()},
        "trainable": get_model_param_count(built.model, trainable_only=True),
        "total": get_model_param_count(built.model),
    }
    return FirstFiles(
        folder=run.folder,
        recipe=recipe,
        environment=environment,
        content={**more, **({"policy.json": policy} if run.folder.writes_policy else {})},
        screen=screen,
        is_writer=bool(run.args.should_save),
    )


class AtFirstStep(TrainerCallback):
    """Write the first files when the first step begins, after its batch has loaded."""

    def __init__(self, files: FirstFiles) -> None:
        self.files = files

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.files.write()


def make_trainer(
    run: Run, records: RunData, rows: Rows, built: Built, base_kl: BaseKL | None, processor: Any, files: FirstFiles
) -> MiloraTrainer:
    collate = data.collator(run.recipe, run.base, processor, records.train[:100])
    collate.always_shows_videos = bool(records.num_with_videos and any(records.with_images))
    with refused_arguments(kinds=(ValueError, ImportError)):  # what no check knows
        trainer = MiloraTrainer(
            built.model,
            run.args,
            targets=built.targets,
            checkpoint_kind=built.checkpoint_kind,
            data_collator=collate,
            train_dataset=rows.rows,
            eval_dataset=records.evaluation,
            processing_class=processor,
            lengths=rows.lengths,
            kinds=None if rows.lengths is None else records.with_images,
            resume_from=run.folder.checkpoint,
            base_kl=base_kl,
        )
    trainer.add_callback(AtFirstStep(files))
    return trainer


def add_measurements(
    trainer: MiloraTrainer, run: Run, probe: Probe | None, questions: TrainingQuestions | None, processor: Any
) -> None:
    config = run.recipe.eval
    if probe is not None and config.forgetting_every:
        measure = lambda: probe.measure(trainer.model, trainer.accelerator.autocast)  # type: ignore[arg-type]  # noqa: E731
        trainer.add_callback(MeasuringCallback(measure, config.forgetting_every, trainer))
    if questions is not None and config.suite_every:
        trainer.suites = SuiteCallback(questions, config.suite_every, trainer, processor)
        trainer.add_callback(trainer.suites)


def train_and_save(run: Run, trainer: MiloraTrainer, batching: Batching, files: FirstFiles) -> None:
    """Train and save; a run that stops before its end still gets its losses, model card and report."""
    with described_if_unfinished(trainer, files):
        run_loop(run, trainer, batching, files)
        if saved_before(run, trainer, batching) is None:
            with run_failures(trainer.args):
                trainer.save_model(_internal_call=True)  # pushed when the pages are there too


def run_loop(run: Run, trainer: MiloraTrainer, batching: Batching, files: FirstFiles) -> None:
    checkpoint, screen = run.folder.checkpoint, files.screen
    if has_all_steps(checkpoint, batching):
        files.write()
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))  # type: ignore[operator]
        return
    try:
        # Autocast casts what it multiplies; PEFT would first widen every input to the adapter's float32.
        with (
            run_failures(trainer.args),
            calls_on_sigterm(trainer.stop_on_signal.on_signal),
            disable_input_dtype_casting(trainer.trained(), active=trainer.accelerator.native_amp),
        ):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        screen.say(f"\nstopped at step {trainer.state.global_step}")
        screen.say(folders.resume_hint(run.folder.path))
        raise
    if trainer.stop_on_signal.stopped and trainer.state.global_step < batching.steps:
        message = f"stopped by SIGTERM at step {trainer.state.global_step}, which is saved"
        hint = "to resume, repeat the command with  --resume_from_checkpoint auto"
        raise UserError(message, hint=hint, exit_code=128 + signal.SIGTERM)
    for warning in data.warnings_of(trainer.data_collator):  # type: ignore[arg-type]
        screen.warn(warning)


def has_all_steps(checkpoint: Path | None, batching: Batching) -> bool:
    """Return whether only the end of the run was lost: HF's loop would make one more step before it sees max_steps."""
    return checkpoint is not None and folders.step_of(checkpoint) == batching.steps


@contextmanager
def described_if_unfinished(trainer: MiloraTrainer, files: FirstFiles) -> Iterator[None]:
    """Write the losses so far, the model card and the report of a run that stops before its end."""
    try:
        yield
    except BaseException:
        if trainer.args.should_save and files.has_begun:
            try:
                write_state(trainer, files)
                write_pages(files.folder, files.recipe, files.screen)
            except OSError as error:  # the disk is full: the user has to read what ended the run, not this
                files.screen.warn(f"no report: {error}")
        raise


def write_state(trainer: MiloraTrainer, files: FirstFiles) -> None:
    """Write trainer_state.json as HF's Trainer does, but atomically: a full disk leaves the one before it."""
    files.folder.write_json("trainer_state.json", asdict(trainer.state))


def saved_before(run: Run, trainer: MiloraTrainer, batching: Batching) -> Path | None:
    """Return the checkpoint that is the result of the run; None if the model in memory is."""
    best = trainer.state.best_model_checkpoint if run.args.load_best_model_at_end else None
    if best is not None:
        return Path(best)
    return run.folder.checkpoint if has_all_steps(run.folder.checkpoint, batching) else None


def complete_folder(run: Run, trainer: MiloraTrainer, batching: Batching, files: FirstFiles, start: float) -> None:
    """Write what the first process alone writes: its minutes for large files keep no other one waiting."""
    with run_failures(run.args):
        if (checkpoint := saved_before(run, trainer, batching)) is not None:
            folders.copy_results(checkpoint, run.folder.path)
        write_state(trainer, files)
    files.environment["finished"] = datetime.now().astimezone().isoformat(timespec="seconds")
    earlier = files.environment.get("seconds_of_earlier", 0.0)
    files.environment["seconds"] = round(earlier + time.monotonic() - start, 1)
    run.folder.write_json(ENVIRONMENT, files.environment)
