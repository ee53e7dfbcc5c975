"""What people see of a run: its lines on the screen, its folder, the report and card, evaluation and upload.

Beside the files of HF's Trainer the folder holds recipe.yaml, environment.json, policy.json, the processor and
README.md. A run that fails before its first step leaves no files.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainingArguments

from milora_data.keys import FileKeys, file_key, record_key
from milora_data.records.record import Record
from milora_vl.common.cli.console import command_line
from milora_vl.common.cli.screen import Screen
from milora_vl.common.errors import DataError, UserError, first_line, out_of_memory
from milora_vl.common.evaluator_protocol import EvaluationRequest, QuestionSet, evaluator
from milora_vl.common.progress import progress_bar
from milora_vl.core.adapter import folders
from milora_vl.core.adapter.fixed_a import Protection, protected_directions
from milora_vl.core.adapter.folders import HELD_OUT, WEIGHTS, has_config, holds_projector_alone, holds_text_model
from milora_vl.core.policy import Target
from milora_vl.core.policy.towers import TOWERS
from milora_vl.core.weights.distributed import gather_objects
from milora_vl.core.weights.tensor_files import unreadable
from milora_vl.models.generate import Prompt, generate
from milora_vl.report import model_card
from milora_vl.report.page import try_write_report
from milora_vl.report.repeat import of_earlier
from milora_vl.train.data import suites_of
from milora_vl.train.plan import Run
from milora_vl.train.resume import CARD, ENVIRONMENT, Entry, RunFolder, refuse_to_overwrite
from milora_vl.train.settings import Recipe
from milora_vl.train.trainer import MiloraTrainer


def protection_lines(targets: Sequence[Target], protection: Mapping[str, Protection]) -> list[str]:
    """Return one line per tower about its protected inputs: means over layers of their shares."""
    lines = []
    for tower in TOWERS:
        members = [protection[t.path] for t in targets if t.tower == tower and t.path in protection]
        if not members:
            continue
        held_out = [entry.held_out for entry in members if entry.held_out is not None]
        line = (
            f"protected inputs  {tower}: {_mean([entry.directions / entry.inputs for entry in members])} of the "
            f"directions, {_mean([entry.energy for entry in members])} of the energy"
        )
        lines.append(line + (f", {_mean(held_out)} on held-out text" if held_out else ""))
    return lines


def _mean(shares: Sequence[float]) -> str:
    return f"{sum(shares) / len(shares):.1%}"


@dataclass(kw_only=True)
class FirstFiles:
    folder: RunFolder
    recipe: Recipe
    environment: dict[str, Any]
    content: Mapping[str, Any]
    screen: Screen
    is_writer: bool  # one of several processes writes
    has_begun: bool = False

    def write(self) -> None:
        if self.has_begun:
            return
        if self.is_writer and self.folder.is_new:  # loading takes minutes, and another run may have begun here
            refuse_to_overwrite(self.folder.path)
        self.has_begun = True
        if not self.is_writer:
            return
        for checkpoint, reason in self.folder.incomplete:
            self.screen.warn(f"{checkpoint.name} {reason}; it is kept as {folders.set_aside(checkpoint).name}")
        self.folder.write_text("recipe.yaml", self.recipe.to_yaml())
        self.folder.write_json(ENVIRONMENT, self.environment)
        for name, value in self.content.items():
            self.folder.write_json(name, value)


def room_lines(targets: Sequence[Target], protection: Mapping[str, Protection], tasks: Sequence[Entry]) -> list[str]:
    """Return a line per tower: the share of input directions that is free, and what was free in each earlier run."""
    lines = []
    for tower, now in protected_directions(targets, protection).items():
        before = [f"{1 - share:.1%} in {task['run']}" for task in tasks if (share := task["directions"].get(tower))]
        line = f"room  {tower}: {1 - now:.1%} of the input directions are free"
        lines.append(f"{line}; {', '.join(before)}" if before else line)
    return lines


NUM_ANSWERED, MAX_NEW_TOKENS = 20, 32  # records that the model answers for the report
# The last ones hold texts and paths of the data.
NOT_UPLOADED = ("_*", "checkpoint-*", "incomplete-checkpoint-*", HELD_OUT)


def open_repository(train: Mapping[str, Any], folder: Path, token: str | None) -> None:
    if token:
        os.environ["HF_TOKEN"] = token
    if not train.get("push_to_hub") or os.environ.get("RANK", "0") != "0":
        return
    from huggingface_hub import HfApi

    name = train.get("hub_model_id") or folder.absolute().name
    try:
        HfApi().create_repo(name, private=train.get("hub_private_repo"), exist_ok=True)
    except Exception as error:  # the classes of the client and its HTTP library differ by version
        where = f"--push_to_hub: cannot open the repository {name}"
        hint = "without:  remove --push_to_hub; to upload the finished run later: hf upload REPOSITORY FOLDER"
        raise UserError(first_line(error), where=where, hint=hint) from None


@contextmanager
def run_failures(args: TrainingArguments) -> Iterator[None]:
    """Give errors of the block the exit code of a run that failed; out of memory names flags that need less."""
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    smaller = f"--per_device_train_batch_size {max(batch // 2, 1)} --gradient_accumulation_steps {2 * accumulation}"
    leaner = "--gradient_checkpointing True, --deepspeed zero3, a smaller --max_length"
    try:
        with out_of_memory(f"the same step in less memory: {smaller}\nor: {leaner}"):
            yield
    except UserError as error:
        raise UserError(problems=error.problems, exit_code=1) from None
    except UnpicklingError as error:  # optimizer, scheduler or random states of a resumed run
        message, hint = f"a file of the checkpoint {unreadable('', error).message}", "resume from an earlier checkpoint"
        raise UserError(message, code="checkpoint-unreadable", hint=hint, exit_code=1) from None


def evaluation_commands(recipe: Recipe, output_dir: Path) -> list[list[str]]:
    """Return one command per suite, without the interpreter: it evaluates the base model and the trained model.

    The questions of the runs that this one came after follow, for the trained model alone.
    """
    questions = [QuestionSet(suite, folder, recipe.eval.limit) for suite, folder in suites_of(recipe).items()]
    requests = {each.suite: EvaluationRequest.of_run(output_dir, recipe.model, each) for each in questions}
    for each in of_earlier(output_dir, next(iter(requests.values()))).values() if requests else ():
        requests.setdefault(each.questions.suite or each.questions.benchmarks, each)
    return [["-m", *evaluator().command(request)] for request in requests.values()]


def evaluate_run(recipe: Recipe, folder: RunFolder, screen: Screen) -> list[str]:
    failed = []
    for command in evaluation_commands(recipe, folder.path):
        gc.collect()  # the trainer holds itself in a circle
        torch.cuda.empty_cache()
        screen.say("python " + " ".join(command))
        if subprocess.run([sys.executable, *command], stdout=sys.stderr).returncode:
            failed.append("python " + " ".join(command))
    return failed


def write_results(recipe: Recipe, folder: RunFolder, screen: Screen, style: str, failed: list[str]) -> int:
    show_results(folder, recipe, screen, style)
    for command in failed:
        screen.warn(f"the evaluation failed, the training is saved; to evaluate again: {command}")
    return 1 if failed else 0


def push_results(folder: RunFolder, repository: str, revision: str | None, screen: Screen) -> bool:
    """Upload the files of a finished run without checkpoints. Returns whether that worked."""
    from huggingface_hub import HfApi

    try:
        with screen.step(f"pushing to {repository}"):
            address = HfApi().upload_folder(
                repo_id=repository,
                folder_path=folder.path,
                commit_message="Model save",
                ignore_patterns=list(NOT_UPLOADED),
                revision=revision,
            )
    except Exception as error:  # as in `open_repository`
        left_out = [word for pattern in NOT_UPLOADED for word in ("--exclude", pattern)]
        again = shlex.join(["hf", "upload", repository, str(folder.path), ".", *left_out])
        saved = f"the training is saved in {folder.path}; to push it again:\n  {again}"
        screen.warn(f"pushing to the hub failed: {first_line(error)}\n{saved}")
        return False
    screen.say(f"pushed   {address}")
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
    if (folder.path / HELD_OUT).is_file():
        rows.append(("held out", str(folder.path / HELD_OUT)))
    rows.append(("recipe", str(folder.path / "recipe.yaml")))
    rows.append(("next", next_command(folder.path, recipe)))
    screen.block(rows)
    if style == "json":
        file = folder.path / "trainer_state.json"
        entries = json.loads(file.read_text(encoding="utf-8"))["log_history"] if file.is_file() else []
        last = {name: value for entry in entries for name, value in entry.items()}  # of each key
        sys.stdout.write(json.dumps({"output_dir": str(folder.path), **dict(rows), "results": last}) + "\n")


def write_pages(folder: RunFolder, recipe: Recipe, screen: Screen) -> Path | None:
    folder.write_text(CARD, model_card.render(folder.path, recipe.model_dump()))
    return try_write_report(folder.path, screen.warn)


def next_command(path: Path, recipe: Recipe) -> str:
    question = ["QUESTION"] if holds_text_model(path) else ["--image", "PICTURE", "What is this?"]
    if has_config(path):
        return command_line("milora_vl.chat", "--model", recipe.model, "--adapter", path, *question)
    if holds_projector_alone(path):
        words = ("--model", recipe.model, "--projector_weights", path, "--data_path", "DATA.json")
        return command_line("milora_vl.train", *words)
    return command_line("milora_vl.chat", "--model", path, *question)


def write_held_out(
    run: Run, trainer: MiloraTrainer, records: Sequence[Record] | None, processor: Any, screen: Screen
) -> None:
    """Write the losses of the held-out records, highest first: wrong labels come first. All processes take part.

    Beside the losses of the last evaluation are the losses with the adapter off. The model in memory is that of the
    last step: where an earlier checkpoint was the best, which the folder holds, the command for its losses is printed.
    """
    is_over = trainer.is_deepspeed_enabled and trainer.deepspeed is None  # resumed without a step left: no engine
    if records is None or is_over or trainer.args.eval_strategy == "no":
        return
    path, last = run.folder.path, trainer.state.global_step
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step not in (None, last):
        if trainer.args.should_save:
            (path / HELD_OUT).unlink(missing_ok=True)  # of the run before it was resumed
        is_whole = trainer.checkpoint_kind == "full"
        of = ("--model", path) if is_whole else ("--model", run.recipe.model, "--adapter", path)
        where = ("--image_folder", run.recipe.data.image_folder) if run.recipe.data.image_folder else ()
        words = ("losses", run.recipe.data.eval_path, *where, *of, "--output", "losses.jsonl")
        command = command_line("milora_eval", *words)
        screen.say(f"the best checkpoint is not the last; losses of its held-out records:  {command}")
        return
    with screen.step("losses of the held-out records"), run_failures(trainer.args):
        after, before = _losses(trainer, measure=trainer.evaluated_step != last), dict[str, float]()
        if trainer.checkpoint_kind == "adapter":
            with cast("Any", trainer.trained()).disable_adapter():
                before = _losses(trainer)
        order = sorted(after, key=lambda key: -after[key])
        key_of = FileKeys(run.recipe.data.image_folder or "")
        by_key = {record_key(record, key_of): record for record in records}
        shown = _shown(run, trainer, {key: by_key[key] for key in order[:NUM_ANSWERED]}, processor)
    if run.args.should_save:
        lines = [
            {
                "key": key,
                "source": by_key[key].place,
                "loss": after[key],
                "base_loss": before.get(key),
                **shown.get(key, {}),
            }
            for key in order
        ]
        run.folder.write_text(HELD_OUT, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


class _Count(TrainerCallback):
    """Counts the batches of an evaluation, which transformers shows on a terminal alone."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.bar.update()


def _losses(trainer: MiloraTrainer, *, measure: bool = True) -> dict[str, float]:
    """Return the losses of all processes, by the content key of the record."""
    if measure:
        loader = trainer.get_eval_dataloader()
        with progress_bar("held-out records", len(loader), "batches", is_shown=trainer.args.should_save) as bar:
            count = _Count(bar)
            trainer.add_callback(count)
            trainer.evaluation_loop(loader, "held-out records", prediction_loss_only=True)
            trainer.remove_callback(count)
    return {key: loss for part in gather_objects(trainer.record_losses) for key, loss in part.items()}


def _shown(
    run: Run, trainer: MiloraTrainer, records: Mapping[str, Record], processor: Any
) -> dict[str, Mapping[str, Any]]:
    """Return what the report shows of each record, by key: its last question and answer, and the model's own."""
    data, lines, prompts = run.recipe.data, list[dict[str, Any]](), list[Prompt]()
    folder = Path(data.image_folder).absolute() if data.image_folder else Path()
    for record in records.values():
        found = record.within(folder)
        last = max(number for number, turn in enumerate(record.turns) if turn.role == "assistant")
        prompts.append(Prompt(record.turns[:last], found.images, videos=found.videos))
        question, answer = (turn.text + turn.keys for turn in record.turns[last - 1 : last + 1])
        pictures = {"image_file": next(map(str, found.images), None), "content": [*map(file_key, found.images)]}
        lines.append({"id": record.id, **pictures, "question": question, "answer": answer})
    size = min(trainer.args.per_device_train_batch_size, 8)  # a step held them
    for start in range(0, len(prompts), size):
        with suppress(DataError), trainer.accelerator.autocast():  # of a picture that is gone
            replies = generate(
                trainer.trained(), processor, prompts[start : start + size], template=run.recipe.template,
                max_new_tokens=MAX_NEW_TOKENS, image_aspect_ratio=data.image_aspect_ratio,
            )  # fmt: skip
            for line, reply in zip(lines[start : start + size], replies, strict=True):
                line["reply"] = reply.text
    return {key: line for key, line in zip(records, lines, strict=True) if "reply" in line}
