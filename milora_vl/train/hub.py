"""`--push_to_hub`: check the repository before the model loads, upload the files of the finished run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from milora_vl.common.errors import UserError, first_line

NOT_UPLOADED = ("_*", "checkpoint-*", "incomplete-checkpoint-*")
WITHOUT = "without:  remove --push_to_hub; to upload the finished run later: hf upload REPOSITORY FOLDER"


def open_repository(train: Mapping[str, Any], folder: Path, token: str | None) -> None:
    """Create the repository of --push_to_hub if it is missing, before the model loads.

    Raises UserError if the run could not push: no network, no token, or a token without the right to write. The token
    of --hub_token is put into HF_TOKEN of this process, so that no file contains it.
    """
    if token:
        os.environ["HF_TOKEN"] = token
    if not train.get("push_to_hub") or os.environ.get("RANK", "0") != "0":
        return
    from huggingface_hub import HfApi

    with hub_errors_explained("--push_to_hub", WITHOUT, exit_code=2):
        access = HfApi().whoami().get("auth", {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise UserError(
            f"it needs a token that can write: this one ({access.get('displayName', '')}) can only read",
            code="hub-read-only-token",
            where="--push_to_hub",
            hint=f"log in with another token:   hf auth login\n{WITHOUT}",
        )
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
        raise UserError(
            first_line(error), code="hub-request-failed", where=what, hint=remedy, exit_code=exit_code
        ) from None


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
    """Return the command that uploads a run."""
    left_out = [word for pattern in NOT_UPLOADED for word in ("--exclude", pattern)]
    return shlex.join(["hf", "upload", repository, str(folder), ".", *left_out])
