"""What went wrong while training, in a few lines: broken data, too little memory or disk, a process that died."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from milora_data.errors import UserError
from milora_vl.weights.torch_files import why_unread

if TYPE_CHECKING:
    from transformers import TrainingArguments

RESUME = "then repeat the command with  --resume_from_checkpoint auto  (what is half written is passed over)"
# Words of torch and safetensors: they raise RuntimeErrors of no class of their own.
NOT_WRITTEN = (
    "No space left",
    "File too large",
    "Disk quota",
    "PytorchStreamWriter",
    "unexpected pos",
    "iostream error",
)
WORKER_DIED = ("DataLoader worker", "exited unexpectedly")
OTHER_DIED = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Socket closed")


@contextmanager
def explained(args: TrainingArguments) -> Iterator[None]:
    """Errors inside become UserErrors with exit code 1 (the run failed) where it is known what they mean."""
    try:
        yield
    except UserError as error:
        raise UserError(without_traceback(str(error)), exit_code=1) from None
    except torch.OutOfMemoryError as error:
        raise UserError(_out_of_memory(str(error), args), exit_code=1) from None
    except UnpicklingError as error:  # the states that a resumed run goes on with
        raise UserError(why_unread("a file of the checkpoint", error), exit_code=1) from None
    except (OSError, SafetensorError, RuntimeError) as error:
        text = _explanation(str(error), args)
        if text is None:
            raise
        raise UserError(text, exit_code=1) from None


def _out_of_memory(said: str, args: TrainingArguments) -> str:
    batch = args.per_device_train_batch_size
    smaller = f"--per_device_train_batch_size {max(batch // 2, 1)} --gradient_accumulation_steps "
    return (
        f"out of memory: {said.splitlines()[0]}\n"
        f"the same step with less: {smaller}{2 * args.gradient_accumulation_steps}\n"
        "or: --gradient_checkpointing True, --deepspeed zero3, a smaller --max_length"
    )


def _explanation(said: str, args: TrainingArguments) -> str | None:
    first = said.strip().splitlines()[0] if said.strip() else ""
    if any(words in said for words in WORKER_DIED):
        return (
            f"a loader process died: {first}\n"
            "the system ends processes when memory runs out; try a smaller --dataloader_num_workers\n" + RESUME
        )
    if any(words in said for words in NOT_WRITTEN):
        return f"cannot write to {args.output_dir}: {first}\nfree some space, or set --save_total_limit\n{RESUME}"
    if args.world_size > 1 and any(words in said for words in OTHER_DIED):
        return f"another process of this run has ended; its own message says why\n({first[:200]})\n{RESUME}"
    return None


def without_traceback(text: str) -> str:
    """The message inside what torch makes of an exception in a loader process.

    >>> without_traceback("Caught E.\\nOriginal Traceback:\\n  File x\\nmilora_data.E: a.png: broken")
    'a.png: broken'
    """
    if "Original Traceback" not in text:
        return text
    lines = text.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("milora_data.")]
    return "\n".join([lines[starts[-1]].partition(": ")[2], *lines[starts[-1] + 1 :]]) if starts else text
