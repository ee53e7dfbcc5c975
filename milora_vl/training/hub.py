"""`--push_to_hub`: what would fail is found before the model loads; files go up when all of them are there."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milora_data.errors import UserError
from milora_vl.config import Recipe
from milora_vl.models import hub_is_known

if TYPE_CHECKING:
    from transformers import TrainingArguments

TOKEN_FLAGS = ("--hub_token", "--push_to_hub_token")
NOT_UPLOADED = ("_*", "checkpoint-*", "incomplete-checkpoint-*")
WITHOUT = "without:  leave --push_to_hub out; to upload the finished run later: hf upload REPOSITORY FOLDER"


def without_token(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Return the recipe without its hub_token, and the token: a run's files are there to be shared."""
    train = dict(recipe.train)
    token = train.pop("hub_token", None)
    return recipe.model_copy(update={"train": train}), token


def hidden_token(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with a token replaced.

    >>> hidden_token(["--hub_token", "hf_x", "--hub-token=hf_x", "--seed", "1"])
    ['--hub_token', 'TOKEN', '--hub-token=TOKEN', '--seed', '1']
    """
    out = list(words)
    for place, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if name.replace("-", "_").replace("__", "--", 1) not in TOKEN_FLAGS:
            continue
        if equals:
            out[place] = f"{name}=TOKEN"
        elif place + 1 < len(words):
            out[place + 1] = "TOKEN"
    return out


def check(train: Mapping[str, Any], output_dir: Path, token: str | None) -> None:
    """Raise UserError if a run with --push_to_hub could not push: no network, no token, or a read-only token.

    A token of --hub_token becomes this process's own, as if HF_TOKEN held it, so that no file has to.
    """
    if token:
        os.environ["HF_TOKEN"] = token
    if not train.get("push_to_hub") or os.environ.get("RANK", "0") != "0":
        return
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(train.get("hub_model_id") or output_dir.resolve().name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub: {first_line(error)}\nname the repository: --hub_model_id OWNER/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push_to_hub: HF_HUB_OFFLINE forbids requests to the hub\n{WITHOUT}")
    if not hub_is_known():
        raise UserError(f"--push_to_hub: {constants.ENDPOINT} is not reachable from this machine\n{WITHOUT}")
    if get_token() is None:
        raise UserError(
            "--push_to_hub needs a token that can write: found none\n"
            f"log in:   hf auth login      (or set HF_TOKEN, or give --hub_token)\n{WITHOUT}"
        )
    with explained("--push_to_hub", WITHOUT, exit_code=2):
        access = HfApi().whoami().get("auth", {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise UserError(
            f"--push_to_hub needs a token that can write: this one ({access.get('displayName', '')}) can only read\n"
            f"log in:   hf auth login      with another token\n{WITHOUT}"
        )


@contextmanager
def explained(what: str, remedy: str, *, exit_code: int = 1) -> Iterator[None]:
    """An error of the hub's client inside becomes a UserError that starts with `what` and ends with `remedy`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # classes of the client and of its HTTP library, which differ by version
        raise UserError(f"{what}: {first_line(error)}\n{remedy}", exit_code=exit_code) from None


def open_repository(args: TrainingArguments) -> None:
    """Make the repository, or find it, right before the Trainer does; UserError where the hub refuses that."""
    if not (args.push_to_hub and args.process_index == 0):
        return
    from huggingface_hub import HfApi

    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    with explained(f"--push_to_hub: the hub does not open the repository {name}", WITHOUT, exit_code=2):
        HfApi().create_repo(name, private=args.hub_private_repo, exist_ok=True)


def push(folder: Path, repository: str, revision: str | None) -> str:
    """Upload the files of a finished run, checkpoints left out; returns their address. UserError where that fails."""
    from huggingface_hub import HfApi

    again = f"the training is saved in {folder}; to push it again:\n  {push_command(folder, repository)}"
    with explained("pushing to the hub failed", again):
        done = HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Model save",
            ignore_patterns=list(NOT_UPLOADED),
            revision=revision,
        )
    return str(done)


def push_command(folder: Path, repository: str) -> str:
    """Return the command that uploads a run."""
    left_out = [word for pattern in NOT_UPLOADED for word in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", repository, str(folder), ".", *left_out])


def first_line(error: BaseException) -> str:
    """Return the first line of an error's words, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
