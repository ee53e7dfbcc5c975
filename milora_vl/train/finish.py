"""The end of a run: its losses and pages, evaluation in a separate process, upload to the hub, the closing block."""

from __future__ import annotations

import gc
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import TrainingArguments

from milora_vl.common.cli.command_line import command_line
from milora_vl.common.errors import UserError, first_line
from milora_vl.common.evaluator import EvaluationRequest, QuestionSet, evaluator
from milora_vl.core.adapter.checkpoints import WEIGHTS
from milora_vl.core.adapter.folders import has_config, holds_projector_alone, holds_text_model
from milora_vl.core.weights.tensor_files import unreadable
from milora_vl.report import model_card
from milora_vl.report.page import try_write_report
from milora_vl.report.repeat import of_earlier
from milora_vl.train.folder import CARD, RunFolder
from milora_vl.train.recipe import Recipe
from milora_vl.train.screen import Screen
from milora_vl.train.setup import suites_of

NOT_UPLOADED = ("_*", "checkpoint-*", "incomplete-checkpoint-*")
WITHOUT = "without:  remove --push_to_hub; to upload the finished run later: hf upload REPOSITORY FOLDER"


def open_repository(train: Mapping[str, Any], folder: Path, token: str | None) -> None:
    if token:
        os.environ["HF_TOKEN"] = token
    if not train.get("push_to_hub") or os.environ.get("RANK", "0") != "0":
        return
    from huggingface_hub import HfApi

    name = train.get("hub_model_id") or folder.absolute().name
    with hub_errors_explained(f"--push_to_hub: cannot open the repository {name}", WITHOUT, exit_code=2):
        HfApi().create_repo(name, private=train.get("hub_private_repo"), exist_ok=True)


@contextmanager
def hub_errors_explained(what: str, remedy: str, *, exit_code: int = 1) -> Iterator[None]:
    """Convert an error of the hub client into a UserError: `what` failed, `remedy` is the hint."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the classes of the client and its HTTP library differ by version
        raise UserError(first_line(error), where=what, hint=remedy, exit_code=exit_code) from None


def push(folder: Path, repository: str, revision: str | None) -> str:
    """Upload the files of a finished run without checkpoints and return their address. Raises UserError on failure."""
    from huggingface_hub import HfApi

    retry = f"the training is saved in {folder}; to push it again:\n  {push_command(folder, repository)}"
    with hub_errors_explained("pushing to the hub failed", retry):
        done = HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Model save",
            ignore_patterns=list(NOT_UPLOADED),
            revision=revision,
        )
    return str(done)


def push_command(folder: Path, repository: str) -> str:
    left_out = [word for pattern in NOT_UPLOADED for word in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", repository, str(folder), ".", *left_out])


@contextmanager
def run_failures(args: TrainingArguments) -> Iterator[None]:
    """Give errors of the block the exit code of a run that failed; out of memory names flags that need less."""
    try:
        yield
    except UserError as error:
        raise UserError(problems=error.problems, exit_code=1) from None
    except UnpicklingError as error:  # optimizer, scheduler or random states of a resumed run
        message, hint = f"a file of the checkpoint {unreadable('', error).message}", "resume from an earlier checkpoint"
        raise UserError(message, code="checkpoint-unreadable", hint=hint, exit_code=1) from None
    except torch.OutOfMemoryError as error:
        batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        smaller = f"--per_device_train_batch_size {max(batch // 2, 1)} --gradient_accumulation_steps {2 * accumulation}"
        hint = f"the same step in less memory: {smaller}\n"
        hint += "or: --gradient_checkpointing True, --deepspeed zero3, a smaller --max_length"
        message = f"out of memory: {first_line(error)}"
        raise UserError(message, hint=hint, exit_code=1) from None


def evaluation_commands(recipe: Recipe, output_dir: Path) -> list[list[str]]:
    """Return one command per suite, without the interpreter: it evaluates the base model and the trained model.

    The questions of the runs that this one came after follow, for the trained model alone.
    """
    questions = [QuestionSet(suite, folder, recipe.eval.limit) for suite, folder in suites_of(recipe).items()]
    requests = {each.suite: EvaluationRequest.of_run(output_dir, recipe.model, each) for each in questions}
    for each in of_earlier(output_dir, next(iter(requests.values()))).values() if requests else ():
        requests.setdefault(each.questions.suite or each.questions.benchmarks, each)
    return [["-m", *evaluator().command(request)] for request in requests.values()]


def evaluate(recipe: Recipe, folder: RunFolder, screen: Screen) -> list[str]:
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
    try:
        with screen.step(f"pushing to {repository}"):
            screen.say(f"pushed   {push(folder.path, repository, revision)}")
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
