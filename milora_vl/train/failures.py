"""Explain errors of PyTorch and the system during training: out of memory, full disk, dead processes, timeout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from milora_vl.common.errors import Problem, UserError
from milora_vl.core.weights.tensor_files import unreadable

if TYPE_CHECKING:
    from transformers import TrainingArguments

RESUME = "then repeat the command with  --resume_from_checkpoint auto  (it skips incomplete checkpoints)"
# Phrases from errors of torch and safetensors, which have no exception classes for these cases.
NOT_WRITTEN = (
    "No space left",
    "File too large",
    "Disk quota",
    "PytorchStreamWriter",
    "unexpected pos",
    "iostream error",
)
LOADER_FAILED = ("DataLoader worker", "DataLoader timed out")  # killed, exited or hung
OTHER_LOST = (
    "Timed out waiting",
    "Watchdog caught collective operation timeout",
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL",
    "Socket closed",
)


@contextmanager
def explained(args: TrainingArguments, folder: Path | None = None) -> Iterator[None]:
    """Turn known errors inside the block into UserErrors with exit code 1 (the run failed); it writes to `folder`."""
    where = str(folder or args.output_dir)
    try:
        yield
    except UserError as error:
        raise UserError(problems=error.problems, exit_code=1) from None
    except torch.OutOfMemoryError as error:
        raise UserError(problems=[_out_of_memory(str(error), args)], exit_code=1) from None
    except UnpicklingError as error:  # optimizer, scheduler or random states of a resumed run
        raise UserError(
            f"a file of the checkpoint {unreadable('', error).message}",
            code="checkpoint-unreadable",
            exit_code=1,
            hint="resume from an earlier checkpoint:  --resume_from_checkpoint FOLDER",
        ) from None
    except (OSError, EOFError, SafetensorError, RuntimeError) as error:
        problem = _explain(str(error), args, where)
        if problem is None:
            raise
        raise UserError(problems=[problem], exit_code=1) from None


def _out_of_memory(text: str, args: TrainingArguments) -> Problem:
    batch = args.per_device_train_batch_size
    smaller = f"--per_device_train_batch_size {max(batch // 2, 1)} --gradient_accumulation_steps "
    hint = (
        f"the same step in less memory: {smaller}{2 * args.gradient_accumulation_steps}\n"
        "or: --gradient_checkpointing True, --deepspeed zero3, a smaller --max_length"
    )
    return Problem(f"out of memory: {text.splitlines()[0]}", "run-out-of-memory", hint=hint)


def _explain(text: str, args: TrainingArguments, where: str) -> Problem | None:
    first = text.strip().splitlines()[0] if text.strip() else ""
    if any(phrase in text for phrase in LOADER_FAILED):
        hint = (
            "killed: memory has run out, or shared memory (/dev/shm; in a container: docker run --shm-size 8g); "
            "try a smaller --dataloader_num_workers\n"
            f"timed out: a picture file on a lost network drive is a common cause\n{RESUME}"
        )
        return Problem(f"the loader processes failed: {first}", "run-loader-failed", hint=hint)
    if any(phrase in text for phrase in NOT_WRITTEN):
        hint = f"free some space, or set --save_total_limit\n{RESUME}"
        return Problem(f"cannot write: {first}", "disk-full", where, hint)
    if args.world_size > 1 and any(phrase in text for phrase in OTHER_LOST):
        hint = f"its own message gives the reason, or it hangs or its machine is lost\n{RESUME}"
        return Problem(
            f"another process of this run has ended or does not answer ({first[:200]})", "run-process-lost", hint=hint
        )
    return None
